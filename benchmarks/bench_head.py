"""Losses and scores from hidden states, each contender of `side_by_side` at a shape that takes seconds.

Contenders that compile need ten seconds each to start and are left to `side_by_side`.
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.cases import DTYPES, Batch, Shape, draw, for_op
from benchmarks.contenders import Contender, contenders
from benchmarks.measure import Judge
from benchmarks.peers import Skipped
from benchmarks.side_by_side import judge_for

SHAPE = Shape(256, 256, 16384)
OPS = ("train", "score", "grpo", "dpo", "sparse")
ENTRANTS = [(op, c) for op in OPS for c in contenders(op) if not c.compiles]


@cache
def _case(op: str, dtype: str) -> tuple[Batch, Judge]:
    base, truth = _base(dtype)
    batch, ref_truth = for_op(op, base, truth)
    return batch, judge_for(op, batch, truth, ref_truth)[0]


_base = cache(lambda dtype: draw(SHAPE, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "contender"), [pytest.param(op, c, id=f"{op}-{c.name}") for op, c in ENTRANTS])
def test_head(benchmark, op: str, contender: Contender, dtype: str):
    batch, judge = _case(op, dtype)
    benchmark.group = f"{op} {SHAPE} {dtype}"
    try:
        step = contender.build(batch)
        errors, verdict = judge(step())
    except (ImportError, Skipped) as error:
        pytest.skip(str(error))
    benchmark.extra_info |= {"verdict": verdict, **errors}
    assert verdict == "ok" or contender.side != "ours"
    benchmark.pedantic(step, rounds=5)
