"""What becomes of a response that the limit cut off, option by option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.rewards import truncation
from trainer.rewards.shaping import RewardOptions

SCORES, CUT = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([False, False, True])


def options(**more: Any) -> RewardOptions:
    return RewardOptions(**{"data": Path(), "reward": "", **more})


@pytest.mark.parametrize(
    ("option", "scores", "counts", "learnt"),
    [
        ("keep", [3.0, -1.0, 2.0], True, None),
        ("mask", [3.0, -1.0, 2.0], True, [0, 1]),
        ("bootstrap", [3.0, -1.0, 2.0], True, None),
        ("penalise", [3.0, -1.0, -1.0], False, None),  # the lowest score of the rollout
    ],
)
def test_what_each_option_does(option: str, scores: list[float], counts: bool, learnt: list[int] | None) -> None:
    cfg = options(truncation=option)
    assert truncation.scored(cfg, SCORES, CUT).tolist() == scores
    assert truncation.own_score_counts(cfg) is counts
    assert truncation.in_loss(cfg, CUT) == learnt
    ahead = truncation.bootstrap(cfg, CUT, torch.tensor([5.0, 6.0, 7.0]))
    assert (None if ahead is None else ahead.tolist()) == ([0.0, 0.0, 7.0] if option == "bootstrap" else None)


def test_a_rollout_without_cuts_is_learnt_from_whole() -> None:
    assert truncation.in_loss(options(truncation="mask"), torch.tensor([False, False])) is None
    assert truncation.in_loss(options(truncation="mask"), torch.tensor([True, True])) == []


def test_an_end_has_its_bonus_and_a_cut_its_fixed_score() -> None:
    cfg = options(eos_bonus=0.5, truncation_score=-4.0)
    assert truncation.scored(cfg, SCORES, CUT).tolist() == [3.5, -0.5, -4.0]
    assert truncation.fixed_score(cfg, only_models=True) == truncation.fixed_score(cfg, only_models=False) == -4.0
    assert truncation.fixed_score(options(), only_models=True) == -2.0
    assert truncation.fixed_score(options(), only_models=False) is None
