"""Advantages and returns of 128 replies of 4096 tokens."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import gae

batch = cache(lambda: gae.Replies.draw(128, 4096))


def judge(found: gae.Pair) -> tuple[dict[str, float], str]:
    errors = gae.errors_of(found, batch())
    return errors, gae.verdict(errors)


@pytest.mark.parametrize("contender", gae.CONTENDERS, ids=lambda c: c.name)
def test_gae(benchmark, entered, contender):
    benchmark.group = "gae 128x4096"
    row = entered(contender, batch(), judge, {"op": "gae", "shape": "128x4096", "dtype": "fp32"}, rounds=10)
    assert row["verdict"] == "ok"
