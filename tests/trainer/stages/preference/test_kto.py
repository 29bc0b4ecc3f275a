"""KTO: its estimate of a KL, and its labels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.small import lines, small_policy, write
from tests.trainer.stages.preference.test_loop import labelled
from trainer.data import reading as data
from trainer.data.packing import pack
from trainer.models.loading import load_policy
from trainer.stages.preference import kto
from trainer.stages.preference.loop import PreferenceLoop


@pytest.mark.parametrize(("seed", "scale", "positive"), [(8, 1.5, False), (4, 6.0, True)])
def test_the_kl_of_kto_is_that_of_mismatched_replies_over_the_whole_step(
    seed: int, scale: float, positive: bool, world: dict[str, Any], tmp_path: Path
) -> None:
    """Also where micro-batches are small, and never below zero."""
    world["data"] = labelled(tmp_path / "l.jsonl", 12)
    small_policy(seed=seed, scale=scale).save(tmp_path / "other")
    for budget in (10_000, 20):
        cfg = kto.KTOConfig(**world, reference=str(tmp_path / "other"), max_tokens=budget)
        method = kto.KTO(cfg)
        loop = PreferenceLoop(cfg, method, print)
        replies = loop.train.replies
        n = len(replies.units)
        for mine, other in zip(replies.samples[:n], replies.samples[n:], strict=True):
            prompt = mine.tokens[: mine.prompt_length]
            assert other.tokens[: other.prompt_length] == prompt
            reply = other.tokens[other.prompt_length :]
            assert reply in [s.tokens[s.prompt_length :] for s in replies.samples[:n] if s is not mine]
        units = replies.units[2:9]
        loop.ready(loop.train, units)
        packed = pack([replies.samples[n + i] for (i,) in units])
        with torch.no_grad():
            other = load_policy(str(tmp_path / "other"))
            kl = float((loop.state.policy.stats(packed).logp - other.stats(packed).logp).sum()) / 7
        assert method.kl == pytest.approx(max(kl, 0.0), rel=1e-4)
        assert (kl > 0.1) if positive else (kl < -0.02)
    world["batch_size"] = 1
    with pytest.raises(ValueError, match="batch_size: got 1, want at least 2"):
        kto.KTO(kto.KTOConfig(**world))


@pytest.mark.parametrize("label", [True, False])
def test_a_reward_that_no_reply_has_is_not_logged(label: bool, world: dict[str, Any], tmp_path: Path) -> None:
    """Zero would read as a measurement, in a step as on held-out replies."""
    kinds = ["rewards/chosen", "rewards/rejected"]
    rows = lines(labelled(tmp_path / "l.jsonl", 12))
    write(tmp_path / "l.jsonl", [row for row in rows if row["label"] == label])
    there, absent = kinds if label else kinds[::-1]
    world |= {"data": tmp_path / "l.jsonl", "eval_data": tmp_path / "l.jsonl", "max_tokens": 20}
    kto.kto(kto.KTOConfig(**world | {"steps": 3, "batch_size": 4, "lr": 3e-3}))
    steps = lines(world["out"] / "metrics.jsonl")
    assert [absent in step or "rewards/margins" in step for step in steps] == [False] * 3
    assert steps[0][there] == pytest.approx(0, abs=1e-6)
    assert steps[-1][there] != 0
    summary = json.loads((world["out"] / "summary.json").read_text())["kto"]
    told = {name for name in summary if "reward" in name}
    assert told == {"held_out_" + there.replace("/", "_")}


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p", "completion": "r", "label": True}, ("p", ["r"], [True])),
        ({"prompt": "p", "response": "r", "label": 0}, ("p", ["r"], [False])),
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, ("p", ["x", "y"], [True, False])),
        ({"prompt": "p", "responses": ["x", "y"], "correct": [False, False]}, ("p", ["x", "y"], [False, False])),
        ({"prompt": "p", "response": "r", "label": "good"}, "label must be true or false"),
        ({"prompt": "p", "response": "r"}, "no label"),
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [0, 1]}, "ranks do not say which reply is desirable"),
    ],
)
def test_labels_come_from_labels_and_from_pairs(row: dict[str, Any], record: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", [row])
    if isinstance(record, str):
        with pytest.raises(ValueError, match=record):
            data.read(path, "labelled")
    else:
        prompt, responses, labels = record
        assert data.read(path, "labelled") == [{"prompt": prompt, "responses": responses, "labels": labels}]


@pytest.mark.parametrize("sizes", [(2,) * 9, (1,) * 7, (1, 3, 2), (5, 1, 1, 3), (4, 4)])
def test_no_reply_is_mismatched_with_its_own_prompt(sizes: tuple[int, ...]) -> None:
    prompts = [f"prompt {i}" for i, n in enumerate(sizes) for _ in range(n)]
    random.Random(0).shuffle(prompts)
    found = [kto._derangement(prompts, seed) for seed in range(20)]
    for other in found:
        assert sorted(other) == list(range(len(prompts)))
        assert all(prompts[i] != prompts[k] for i, k in enumerate(other))
    assert len({tuple(other) for other in found}) > 1
    assert sorted(kto._derangement(["one"] * 3, 0)) == [0, 1, 2]
