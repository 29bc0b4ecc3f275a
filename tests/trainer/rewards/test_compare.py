"""A judge that only compares makes a score of its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import world
from tests.support.small import lines, small_policy
from tests.trainer.rewards.test_sources import score
from trainer.data.packing import Sample
from trainer.rewards.compare import by_comparison
from trainer.rewards.shaping import RewardOptions
from trainer.rewards.sources import reward_from
from trainer.sampling.rollout import Rollout
from trainer.stages.rl import grpo
from trainer.stages.rl import stage as rl_stage

HERE = "tests.trainer.rewards.test_compare"


def shorter(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that compares, and that likes the first place a little."""
    return [min(float(len(a) < len(b)) + 0.1, 1.0) for a, b in zip(first, second, strict=True)]


def undecided(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [2.0] * len(prompts)


def test_a_judge_that_compares_makes_a_score_of_its_verdicts(tmp_path: Path) -> None:
    """Against the others to the same prompt, in both orders, so that a liking for the first place cancels."""
    with pytest.raises(ValueError, match="nothing to hold against the only response to 'a b'"):
        score(f"compare:{HERE}:shorter")
    reward = reward_from(
        f"compare:{HERE}:shorter", small_policy().tokenizer, max_length=64, max_tokens=99, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"gave 2\.0 for the prompt 'a', want a number from 0 to 1"):
        by_comparison(undecided)(["a", "a"], ["b", "c"], [{}, {}])
    said = [[4, 1], [4, 5, 1], [4, 5, 6, 1], [4, 5, 1]]
    rollout = Rollout([Sample([2, *x], 1) for x in said], [False] * 4, [[0.0] * len(x) for x in said])
    alone: dict[str, Any] = {"prompt": "z", "extra": {"response": "a b c"}}
    found = reward(rollout, [{"prompt": "a"}] * 3 + [alone])
    torch.testing.assert_close(found, torch.tensor([0.95, 0.5, 0.05, 0.95]))
    options: dict[str, Any] = world(tmp_path) | {"reward": f"compare:{HERE}:shorter", "steps": 1}
    rl_stage.grpo(grpo.GRPOConfig(**options, num_generations=3))
    (step,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert step["objective/scores"] == pytest.approx(0.5, abs=0.05)  # every win is another's loss, but for ties


def options(**more: Any) -> RewardOptions:
    return RewardOptions(**{"data": Path(), "reward": "", **more})
