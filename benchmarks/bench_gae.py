"""Advantages and returns of 128 replies of 4096 tokens."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import gae, place

batch = cache(lambda device: gae.Replies.draw(128, 4096, place.place(device)))


@pytest.mark.parametrize("contender", gae.CONTENDERS, ids=lambda c: c.name)
def test_gae(benchmark, entered, device, contender):
    def judge(found: gae.Pair) -> tuple[dict[str, float], str]:
        errors = gae.errors_of(found, batch(device))
        return errors, gae.verdict(errors)

    benchmark.group = "gae 128x4096"
    row = entered(contender, batch(device), judge, {"op": "gae", "shape": "128x4096", "dtype": "fp32"}, rounds=10)
    assert row["verdict"] == "ok"
