"""Intervals cover what they are to cover."""

from __future__ import annotations

import random

import pytest

from trainer.base.statistics import mean, proportion, ratio_change
from trainer.evaluation.win_rate import win_rate


def test_intervals_cover() -> None:
    source, inside = random.Random(0), 0
    for _ in range(400):
        inside += (e := proportion(sum(source.random() < 0.9 for _ in range(50)), 50)).low <= 0.9 <= e.high
    assert 0.91 <= inside / 400 <= 0.99
    inside = 0
    for seed in range(200):
        e = mean([source.gauss(1, 2) for _ in range(60)], resamples=400, seed=seed)
        inside += e.low <= 1 <= e.high
    assert 0.88 <= inside / 200 <= 0.99
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 0]).value == 0.625


def test_changes_are_paired() -> None:
    grown = ratio_change([1.0, 5.0, 2.0, 8.0], [1.2, 6.0, 2.4, 9.6])
    assert grown.value == pytest.approx(0.2)
    assert grown.high - grown.low < 1e-9
    mixed = ratio_change([1.0, 1.0, 1.0, 1.0], [0.5, 1.5, 0.6, 1.4])
    assert mixed.low < 0 < mixed.high
