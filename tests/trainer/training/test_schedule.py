"""The learning rate, step by step."""

from __future__ import annotations

import itertools
import math

import pytest

from trainer.training.schedule import learning_rate


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_it_rises_in_a_line_and_ends_where_its_kind_says(kind: str) -> None:
    rates = [learning_rate(t, peak=2.0, warmup=4, total=24, kind=kind) for t in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    done = 19 / 20  # the last step is taken when this share of the fall lies behind
    last = {"constant": 2.0, "linear": 2 * (1 - 0.9 * done), "cosine": 0.2 + 0.9 * (1 + math.cos(math.pi * done))}
    assert rates[-1] == pytest.approx(last[kind])
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    after = learning_rate(99, peak=2.0, warmup=4, total=24, kind=kind)
    assert after == pytest.approx(2.0 if kind == "constant" else 0.2)


def test_without_a_rise_it_begins_at_the_peak() -> None:
    assert learning_rate(0, peak=1.0, warmup=0, total=1, kind="cosine") == 1.0
