"""What goes wrong in trainers that learn from preferences, each named after its number in the design."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer_worlds import LETTERS, lines, ragged, small_policy, write
from trainer import cli, data, kto, pairs, preference
from trainer.models import Policy, load_policy
from trainer.packing import pack
from trainer.preference import Loop, PreferenceConfig
from trainer.replies import Reference, parts_of, reference_model, totals_of
from trainer.tiny import byte_tokenizer, tiny_policy

STAGES: dict[str, tuple[type[PreferenceConfig], Callable[..., Policy], dict[str, Any]]] = {
    "dpo": (pairs.DPOConfig, pairs.dpo, {}),
    "hinge": (
        pairs.DPOConfig, pairs.dpo,
        {"loss": "hinge", "margin": 0.5, "sft_coef": 0.3, "length_normalize": True, "label_smoothing": 0.1},
    ),
    "ipo": (pairs.IPOConfig, pairs.ipo, {}),
    "orpo": (pairs.ORPOConfig, pairs.orpo, {}),
    "simpo": (pairs.SimPOConfig, pairs.simpo, {"sft_coef": 0.3}),
    "kto": (kto.KTOConfig, kto.train, {"desirable_weight": 1.3}),
}  # fmt: skip
QUIET: dict[str, Any] = {"quiet": True, "batch_size": 8, "warmup_steps": 2}


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """A model and pairs of ragged replies; the chosen one has more a."""
    small_policy(scale=1.0).save(tmp_path / "model")
    source, rows = random.Random(1), []
    for _ in range(24):
        chosen = ["a"] * 3 + source.sample(LETTERS[1:], source.randint(1, 9))
        rejected = source.sample(LETTERS[1:], source.randint(1, 9))
        rows.append({"prompt": " ".join(source.sample(LETTERS, source.randint(1, 5))), "chosen": " ".join(chosen),
                     "rejected": " ".join(rejected)})  # fmt: skip
    return QUIET | {
        "model": str(tmp_path), "data": write(tmp_path / "pairs.jsonl", rows), "out": tmp_path / "out",
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_pitfall_03_the_first_step_stands_at_the_reference(stage: str, world: dict[str, Any]) -> None:
    """Implicit rewards are zero before the first update, with dropout in the configuration as well."""
    policy = small_policy(scale=1.0)
    policy.model.config.attention_dropout = 0.1
    policy.save(Path(world["model"]) / "model")
    config, train, options = STAGES[stage]
    train(config(**world, **options, steps=1))
    (first,) = lines(world["out"] / "metrics.jsonl")
    if stage in ("orpo", "simpo"):
        assert first["rewards/chosen"] < 0
        return
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-6)
    if stage != "hinge":
        wanted = {"dpo": math.log(2), "ipo": 1 / 0.2**2, "kto": 0.5 * (1.3 + 1) / 2}[stage]
        share = first["loss"] if stage != "kto" else None
        assert share is None or share == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_pitfall_05_micro_batches_change_nothing(stage: str, world: dict[str, Any]) -> None:
    """Loss, every metric and the gradient of a step, away from the reference, for any budget."""
    config, train, options = STAGES[stage]
    found = []
    for budget in (10_000, 30, 1):
        loops: list[Loop] = []

        def kept(
            cfg: PreferenceConfig, method: preference.Method, log: Any, resume: bool, into: list[Loop] = loops
        ) -> None:
            into.append(Loop(cfg, method, print))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preference, "train", kept)
            train(config(**world, **options, max_tokens=budget, lr=1e-2))
        (loop,) = loops
        metrics = [loop.step() for _ in range(2)][1]
        units = loop.train.replies.units[:7]
        parts, totals = loop.ready(loop.train, units)
        for part in parts:
            loop.loss(part, totals).loss.backward()
        flat = torch.cat([p.grad.flatten() for p in loop.state.policy.parameters() if p.grad is not None])
        found.append((len(parts), metrics, flat))
    assert [n for n, _, _ in found] == [1, found[1][0], 7]
    assert 1 < found[1][0] < 7
    for _, metrics, flat in found[1:]:
        # The weights themselves differ in their last bits after an optimizer step.
        assert (flat - found[0][2]).norm() <= 2e-4 * flat.norm()
        for name, x in metrics.items():
            assert x == pytest.approx(found[0][1][name], rel=2e-3, abs=2e-5), name


def test_pitfall_04_the_reference_says_the_same_alone_packed_before_and_during_training(tmp_path: Path) -> None:
    policy, samples = small_policy(), ragged(7)
    cfg = pairs.DPOConfig(data=tmp_path, max_tokens=50)
    once, always = (Reference(cfg, policy, samples, once=once) for once in (True, False))
    assert once.model is None
    order = [3, 0, 6, 1]
    packed = pack([samples[i] for i in order])
    logp = once.logp(order, packed)
    torch.testing.assert_close(logp, always.logp(order, packed), rtol=1e-5, atol=1e-5)
    assert not logp[~packed.mask].any()
    for i, mine in zip(order, logp.split(packed.lengths), strict=True):
        alone = pack([samples[i]])
        with torch.no_grad():
            torch.testing.assert_close(mine, policy.stats(alone).logp, rtol=1e-5, atol=1e-5)


def test_references_with_other_tokens_are_refused(tmp_path: Path) -> None:
    tiny_policy(byte_tokenizer(["a b c d"], 300), 0, hidden=32).save(tmp_path / "bytes")
    with pytest.raises(ValueError, match="reference: want the tokenizer of the policy"):
        reference_model(small_policy(), str(tmp_path / "bytes"))
    small_policy(3).save(tmp_path / "other")
    packed = pack(ragged(3))
    with torch.no_grad():
        found = reference_model(small_policy(), str(tmp_path / "other"))
        assert torch.equal(found.stats(packed).logp, small_policy(3).stats(packed).logp)
    assert not any(p.requires_grad for p in found.parameters())


def test_a_ranked_list_stands_for_its_pairs_and_the_chosen_reply_comes_first() -> None:
    record = {"prompt": "a", "responses": ["b", "c d", "e f g"], "ranks": [2, 1, 1]}
    tokenizer = small_policy().tokenizer

    def nothing(*_: Any) -> Any:
        raise AssertionError

    replies = pairs.Pairs("dpo", 64, nothing).encode(tokenizer, [record])
    texts = [tokenizer.decode(s.tokens[s.prompt_length :], skip_special_tokens=True) for s in replies.samples]
    assert texts == ["c d", "b", "e f g", "b"]
    assert (replies.units, replies.good) == ([(0, 1), (2, 3)], [True, False, True, False])
    (part,) = parts_of(replies, [(2, 3), (0, 1)], None, 1000, "cpu")
    assert part.packed.lengths == (5, 3, 4, 3)
    assert totals_of([part]) == (2, 2, 4 + 3)  # two pairs, and the tokens of the chosen replies with their ends


def labelled(path: Path, count: int) -> Path:
    source, rows = random.Random(2), []
    for i in range(count):
        words = source.sample(LETTERS[1:], source.randint(1, 6)) + ["a"] * (3 * (i % 3 == 0))
        rows.append({"prompt": " ".join(source.sample(LETTERS, 2)), "completion": " ".join(words), "label": i % 3 == 0})
    return write(path, rows)


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
        loop = Loop(cfg, method, print)
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
    kto.train(kto.KTOConfig(**world | {"steps": 3, "batch_size": 4, "lr": 3e-3}))
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


@pytest.mark.parametrize("stage", STAGES)
def test_margins_rise(stage: str, world: dict[str, Any], tmp_path: Path) -> None:
    """On held-out replies, too, by the name that logs have had."""
    config, train, options = STAGES[stage]
    if stage == "kto":
        world["data"] = labelled(tmp_path / "l.jsonl", 60)
    train(config(**world | {"lr": 3e-3, "steps": 30, "eval_data": world["data"]}, **options))
    steps = lines(world["out"] / "metrics.jsonl")
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.05
    assert steps[-1]["loss"] < steps[0]["loss"]
    if stage == "kto":
        assert steps[-1]["rewards/chosen"] > 0 > steps[-1]["rewards/rejected"] - 0.05
    else:
        assert steps[-1]["rewards/accuracies"] >= 0.9
        assert steps[-1]["logps/chosen"] < 0
    assert '"held_out_' in (world["out"] / "summary.json").read_text()
    assert load_policy(str(world["out"])).weight.isfinite().all()


@pytest.mark.parametrize("stage", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_method_runs_from_the_command_line(
    stage: str, world: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):  # written by the command; the test's own come back
        monkeypatch.setenv(name, "1")
    flags = ["--model", world["model"], "--data", world["data"], "--out", world["out"], "--eval-data", world["data"]]
    assert cli.main([stage, *map(str, flags), "--steps", "2", "--batch-size", "5", "--quiet"]) == 0
    assert len(lines(world["out"] / "metrics.jsonl")) == 2
    assert (world["out"] / "report.html").exists()
    capsys.readouterr()
    assert cli.main([stage, *map(str, flags), "--beta", "0", "--overwrite"]) == 2
    assert "beta: got 0" in capsys.readouterr().err


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
