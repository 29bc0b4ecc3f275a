"""Advantages and returns of 128 replies of 4096 tokens."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.contenders.gae import CONTENDERS
from benchmarks.measure.place import place
from benchmarks.work.replies import Replies, judge_for

batch = cache(lambda device: Replies.draw(128, 4096, place(device)))


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_gae(benchmark, entered, device, contender):
    benchmark.group = "gae 128x4096"
    about = {"op": "gae", "shape": "128x4096", "dtype": "fp32"}
    row = entered(contender, batch(device), judge_for(batch(device)), about, rounds=10)
    assert row["verdict"] == "ok"
