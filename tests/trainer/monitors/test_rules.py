"""Each rule on a series made for it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.monitors.history import Thresholds
from trainer.monitors.monitor import Monitor


def alarms(signals: list[dict[str, float]], thresholds: Thresholds | None = None) -> list[tuple[str, int, int]]:
    """(rule, since, step) of everything that a series sets off."""
    monitor = Monitor(thresholds)
    found = [alarm for step, row in enumerate(signals, start=1) for alarm in monitor.observe(step, row)]
    assert found == monitor.alarms
    return [(a.name, a.since, a.step) for a in found]


def series(count: int, **signals: Any) -> list[dict[str, float]]:
    """Signals per update, from numbers or from functions of the update."""
    return [{name: float(x(i) if callable(x) else x) for name, x in signals.items()} for i in range(1, count + 1)]


ERRORS = {"proxy_se": 0.05, "gold_se": 0.05, "gold_std": 1.0}


def test_a_rising_reward_over_a_falling_gold_score():
    hacked = series(20, proxy=lambda i: 0.1 * i, gold=lambda i: 1 + 0.1 * min(i, 10) - 0.15 * max(i - 10, 0), **ERRORS)
    ((name, since, step),) = alarms(hacked)
    assert name == "proxy_gold"
    assert 10 <= since < step <= 17
    both_fall = series(30, proxy=lambda i: 1 - 0.1 * i, gold=lambda i: 1 - 0.1 * i, **ERRORS)
    both_rise = series(30, proxy=lambda i: 0.1 * i, gold=lambda i: 0.05 * i, **ERRORS)
    small = series(30, proxy=lambda i: 0.1 * i, gold=lambda i: 1 - 0.005 * i, **(ERRORS | {"gold_se": 0.001}))
    noisy = series(30, proxy=lambda i: 0.1 * i, gold=lambda i: 1 - 0.03 * i, **(ERRORS | {"gold_se": 0.8}))
    for quiet in (both_fall, both_rise, small, noisy):
        assert alarms(quiet) == []


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ({"kl": lambda i: 9.0 if i < 8 else 14.0}, ("kl", 9, 10)),
        ({"kl": lambda i: 0.45 * i}, ("kl", 13, 14)),  # from 0.9, over updates 1 to 3, to 4.95
        ({"kl": lambda i: min(0.5 * i, 3.0)}, None),
        ({"length": lambda i: 10 + 0.5 * i}, ("length", 10, 11)),
        ({"length": lambda i: 10 - 0.3 * i}, ("length", 13, 14)),
        ({"length": lambda i: 10 - 0.1 * i}, None),
        ({"length_corr": lambda i: 0.1 * i}, ("length", 8, 9)),
        ({"length_corr": 0.4}, None),
        ({"entropy": lambda i: 1 / i}, ("collapse", 9, 10)),
        ({"distinct": lambda i: 1.0 if i < 5 else 0.3}, ("collapse", 8, 9)),
        ({"forms": lambda i: 40.0 if i < 5 else 1.5}, ("collapse", 9, 10)),
        ({"forms": lambda i: 20.0 if i < 5 else 3.0}, None),
        ({"truncated": lambda i: 0.05 * i}, ("truncation", 7, 8)),
        ({"truncated": lambda i: 1.0 if i == 1 else 0.1}, ("truncation", 1, 1)),
        ({"truncated": lambda i: 0.5 if i == 2 else 0.1, "ignored": lambda i: 0.5 * (i == 2)}, ("truncation", 2, 2)),
        ({"step_kl": lambda i: 0.2 if i == 3 else 0.01}, ("update", 3, 3)),
        ({"step_after": lambda i: 0.2 if i == 3 else 0.01}, ("update", 3, 3)),
        ({"step_kl": 0.09, "step_ratio": 1.2, "step_loss": -90.0, "kl": 0.0, "length": 10.0}, None),
        ({"step_ratio": lambda i: 0.7 if i == 1 else 1.0}, ("update", 1, 1)),
        ({"step_loss": lambda i: -200.0 if i == 2 else 0.0}, ("update", 2, 2)),
        ({"kl": lambda i: 4.0 * (i > 4), "length": 10.0}, None),
        ({"no_difference": lambda i: float(i > 3), "proxy": 0.0, "proxy_se": 0.0}, ("no_difference", 4, 5)),
        ({"no_difference": lambda i: float(i % 2), "proxy": 0.0, "proxy_se": 0.0}, None),
        ({"lm_loss": lambda i: 2.0 if i < 6 else 2.2}, ("tax", 6, 6)),
        ({"lm_loss": lambda i: 2.0 if i < 6 else 2.05}, None),
        ({"self_praise": lambda i: 0.02 * i}, ("self_praise", 6, 7)),
        ({"sycophancy": lambda i: 0.2 if i < 4 else 0.4}, ("sycophancy", 4, 4)),
    ],
)
def test_each_rule(signals: dict[str, Any], expected: tuple[str, int, int] | None):
    found = alarms(series(16, **signals))
    assert found[:1] == ([expected] if expected else [])


def test_a_win_rate_that_falls_beyond_its_interval():
    rows = series(40, proxy=lambda i: 0.01 * i)
    for at, value in ((1, 0.5), (10, 0.7), (20, 0.66), (30, 0.5), (40, 0.45)):
        rows[at - 1] |= {"win_rate": value, "win_rate_low": value - 0.08, "win_rate_high": value + 0.08}
    assert alarms(rows) == [("win_rate", 10, 30)]  # and it is not told again at 40
    for row in rows:
        row["proxy"] *= -1
    assert alarms(rows) == []


def test_alarms_come_back_after_a_pause_and_not_before():
    rows = series(60, kl=lambda i: 20.0 if i <= 20 or i > 40 else 0.0)
    assert [a for a in alarms(rows) if a[0] == "kl"] == [("kl", 1, 2), ("kl", 42, 43)]
