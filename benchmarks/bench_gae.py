"""Advantages and returns of 128 replies of 4096 tokens."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import gae

batch = cache(lambda: gae.Replies.draw(128, 4096))


@pytest.mark.parametrize("contender", gae.CONTENDERS, ids=lambda c: c.name)
def test_gae(benchmark, contender):
    benchmark.group = "gae 128x4096"
    try:
        step = contender.build(batch())
    except ImportError as error:
        pytest.skip(str(error))
    errors = gae.errors_of(step(), batch())
    benchmark.extra_info |= errors
    assert gae.verdict(errors) == "ok"
    benchmark.pedantic(step, rounds=10)
