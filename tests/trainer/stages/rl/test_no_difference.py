"""A rollout in which all answers to a prompt score alike: no step, no forward pass, a word about it, and an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import Stopper, config, finished, one_step_at_a_time, train, world
from tests.support.small import lines
from trainer.models import policy as policies
from trainer.models.loading import load_policy
from trainer.stages.rl import grpo

HERE = "tests.trainer.stages.rl.test_no_difference"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("level"))


def level(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Any]) -> list[float]:
    """One number for every answer to a prompt."""
    return [float(len(prompt)) for prompt in prompts]


def every_second(prompts: Sequence[str], responses: Sequence[str], records: Sequence[Any]) -> list[float]:
    """Nothing to tell for prompts that begin in the first half of the alphabet."""
    return [0.0 if prompt < "k" else float(len(response)) for prompt, response in zip(prompts, responses, strict=True)]


def weights(out: Path) -> list[torch.Tensor]:
    return [p.detach() for p in load_policy(str(out)).parameters()]


def test_nothing_moves_and_nobody_looks(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def looked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no model has to look at such a rollout")

    cfg = config("grpo", path, tmp_path / "run", steps=3, reward=f"{HERE}:level", quiet=False)
    with monkeypatch.context() as patch:
        patch.setattr(policies.Policy, "stats", looked)
        train(cfg)
    before = weights(path / "base")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(cfg.out), strict=True))
    rows = lines(cfg.out / "metrics.jsonl")
    assert [row["policy/no_difference"] for row in rows] == [1.0] * 3
    assert all(row["frac_reward_zero_std"] == 1 and "lr" not in row for row in rows)
    said = " ".join(capfd.readouterr().out.split())
    assert said.count("scored alike, so this rollout takes no step") == 1
    (alarm,) = [a for a in lines(cfg.out / "alarms.jsonl") if a["name"] == "no_difference"]
    assert (alarm["since"], alarm["step"]) == (1, 2)
    assert alarm["message"].startswith("all answers to the same prompt score alike")


@pytest.mark.parametrize("options", [{"entropy_coef": 0.1}, {"ptx_coef": 0.1}])
def test_what_wants_steps_without_a_reward_gets_them(options: dict[str, Any], path: Path, tmp_path: Path) -> None:
    ptx = {"ptx_data": path / "sft.jsonl", "ptx_batch_size": 3} if "ptx_coef" in options else {}
    cfg = config("grpo", path, tmp_path / "run", steps=1, reward=f"{HERE}:level", **options, **ptx)
    train(cfg)
    (row,) = lines(cfg.out / "metrics.jsonl")
    assert row["policy/no_difference"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(weights(path / "base"), weights(cfg.out), strict=True))


def test_what_counts_is_what_a_score_is_compared_with(tmp_path: Path) -> None:
    groups = torch.tensor([1.0, 1.0, 2.0, 2.0])
    common: dict[str, Any] = {"data": tmp_path, "reward": "", "num_generations": 2}
    assert grpo.GRPO(grpo.GRPOConfig(**common)).nothing_in(groups)
    assert not grpo.GRPO(grpo.GRPOConfig(**common)).nothing_in(torch.tensor([1.0, 1.0, 2.0, 2.1]))
    batch = grpo.GRPO(grpo.GRPOConfig(**common, baseline="batch", scale="batch_std"))
    assert not batch.nothing_in(groups)
    assert batch.nothing_in(torch.ones(4))


def test_stopped_in_between_and_resumed(path: Path, tmp_path: Path, stopper: Stopper) -> None:
    """Some rollouts have a difference and some have none; a life for every safe point leaves the same bits."""
    options = {"steps": 6, "batch_size": 1, "reward": f"{HERE}:every_second"}
    train(whole := config("grpo", path, tmp_path / "whole", **options))
    seen = [row["policy/no_difference"] for row in lines(whole.out / "metrics.jsonl")]
    assert set(seen) == {0.0, 1.0}
    cfg = config("grpo", path, tmp_path / "run", **options)
    assert one_step_at_a_time(cfg, stopper) > 6
    assert finished(cfg.out) == finished(whole.out)
