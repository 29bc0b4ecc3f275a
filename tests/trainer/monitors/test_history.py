"""Thresholds: on the signals of runs that were recorded, and those that mean nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.monitors import read as recorded
from benchmarks.studies.monitors import replay
from trainer.monitors.history import Thresholds

SERIES = Path(__file__).parents[2] / "data" / "monitor_series.jsonl"


def runs(arm: str) -> list[dict[str, Any]]:
    found = [run for run in recorded(SERIES) if run["arm"] == arm]
    assert {run["seed"] for run in found} >= set(range(5))
    return found


def test_pitfall_02_hack_alarm() -> None:
    """Without a KL penalty, against a weak reward model: recorded runs of five seeds, through today's thresholds."""
    for run in runs("hack"):
        assert len(run["signals"]["kl"]) == 40
        alarms = {alarm.name: alarm for alarm in reversed(replay(run["signals"]))}
        assert alarms["proxy_gold"].step <= 20, run["seed"]
        assert alarms["proxy_gold"].since < alarms["proxy_gold"].step
        # Whoever has no gold score is warned by the KL.
        alone = {k: v for k, v in run["signals"].items() if not k.startswith(("gold", "win_rate"))}
        assert min(alarm.step for alarm in replay(alone)) <= 20, run["seed"]


def test_pitfall_02_healthy_runs_are_quiet() -> None:
    for run in runs("ppo"):
        assert len(run["signals"]["kl"]) == 40
        assert replay(run["signals"]) == [], run["seed"]


@pytest.mark.parametrize("bad", [{"window": 0}, {"kl_per_seq": -1.0}, {"patience": 1.5}, {"entropy": math.nan}])
def test_thresholds_that_mean_nothing_are_refused(bad: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Thresholds(**bad)
