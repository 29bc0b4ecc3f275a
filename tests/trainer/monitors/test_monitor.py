"""Monitors: each rule on a series made for it, signals by hand, resuming, and what an alarm does to a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.studies.monitors import plots, replay, rows_of
from benchmarks.studies.monitors import read as recorded
from trainer.monitors.measures import Samples, of_log
from trainer.monitors.monitor import Monitor

SERIES = Path(__file__).parents[2] / "data" / "monitor_series.jsonl"


def test_what_is_not_there_or_not_a_number_sets_nothing_off():
    monitor = Monitor()
    for step in range(1, 30):
        assert monitor.update(step, {"objective/kl": math.nan, "response/truncated": math.inf, "lr": 1.0}) == []
    assert monitor.seen.recent == {}


def test_a_monitor_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    run = next(r for r in recorded(SERIES) if r["arm"] == "hack")
    rows = rows_of(run["signals"])
    whole = Monitor()
    for step, row in enumerate(rows, start=1):
        whole.observe(step, row)
    assert whole.alarms
    parted = Monitor()
    for step, row in enumerate(rows, start=1):
        parted.observe(step, row)
        state = json.loads(json.dumps(parted.state_dict(), allow_nan=False))
        parted = Monitor()
        parted.load_state_dict(state)
    assert parted.state_dict() == whole.state_dict()
    assert parted.alarms == whole.alarms


def test_a_rollout_that_was_seen_before_a_checkpoint_counts_after_it():
    samples = Samples(["p"] * 4, ["a", "b", "c", "d"], [1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0])
    one, other = Monitor(), Monitor()
    one.see(samples)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    other.update(1, {"objective/kl": 1.0})
    one.update(1, {"objective/kl": 1.0})
    assert other.metrics() == one.metrics()
    assert other.metrics()["monitor/length_corr"] == pytest.approx(1.0)
    assert of_log(other.metrics() | {"objective/kl": 1.0}) == other.seen.last


def test_the_drawings_of_the_documentation_show_every_run_and_every_alarm(tmp_path: Path):
    plots(SERIES, tmp_path)
    told = [alarm for run in recorded(SERIES) for alarm in replay(run["signals"])]
    tree = ElementTree.parse(tmp_path / "monitors-gold.svg")
    drawn = [node.tag.rpartition("}")[2] for node in tree.iter()]
    assert drawn.count("polyline") == len(recorded(SERIES)) == 10
    assert drawn.count("circle") == sum(alarm.name == "proxy_gold" for alarm in told) >= 5
