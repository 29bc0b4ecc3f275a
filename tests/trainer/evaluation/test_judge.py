"""Who decides between two responses: functions that compare, and reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.small import small_scalar
from trainer.evaluation.stage import EvalConfig, evaluate

HERE = "tests.trainer.evaluation.test_judge"


def first_wins(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that looks at the place and at nothing else."""
    return [1.0 for _ in prompts]


def more_of_b(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that compares."""
    return [0.5 + 0.5 * ((x > y) - (x < y)) for x, y in zip(_b(first), _b(second), strict=True)]


def unsure(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that does not keep to the scale."""
    return [2.0 for _ in prompts]


def _b(texts: Sequence[str]) -> list[int]:
    return [t.split().count("b") for t in texts]


def test_judges_that_compare_are_asked_in_both_orders(world: EvalConfig) -> None:
    by_place = evaluate(replace(world, judge=f"compare:{HERE}:first_wins"))
    assert by_place["responses"]["policy"]["win_rate"].value == 0.5
    assert "score" not in by_place["responses"]["policy"]
    one = evaluate(replace(world, judge=f"compare:{HERE}:more_of_b"))["responses"]["policy"]["win_rate"].value
    assert world.base is not None
    other = evaluate(replace(world, judge=f"compare:{HERE}:more_of_b", model=world.base, base=world.model))
    assert one != 0.5
    assert other["responses"]["policy"]["win_rate"].value == pytest.approx(1 - one)
    with pytest.raises(ValueError, match=r"gave 2\.0 for the prompt"):
        evaluate(replace(world, judge=f"compare:{HERE}:unsure"))


def test_reward_models_judge_too(world: EvalConfig, tmp_path: Path) -> None:
    scalar = small_scalar()
    scalar.set_statistics(torch.tensor([0.0, 2.0]))
    scalar.save(tmp_path / "rm" / "model")
    found = evaluate(replace(world, judge=str(tmp_path / "rm")))["responses"]
    assert found["policy"]["score"].value != found["base"]["score"].value
    alone = evaluate(replace(world, judge=str(tmp_path / "rm"), base=None))["responses"]
    assert alone["policy"]["score"] == found["policy"]["score"]
    assert "win_rate" not in alone["policy"]
