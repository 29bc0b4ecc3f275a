"""Losses and scores from hidden states, each contender of `side_by_side` at a shape that takes milliseconds.

    pytest benchmarks/ --benchmark-only                  # a small grid: every op, what compiles in some of them
    pytest benchmarks/ --benchmark-only --grid full      # an hour: larger shapes, four entropies, everybody everywhere

Memory is of a process a contender, where Linux tells it.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import memory
from benchmarks.cases import DTYPES, HEAD_OPS, SHAPES, UNIFORM, Batch, Shape, draw, for_op
from benchmarks.contenders import Contender, contenders
from benchmarks.judge import Judge, judge_for

SMALL = Shape(256, 256, 16384, ragged=True)
COMPILED = ("train", "score", "grpo", "dpo", "sft", "kl", "logits")  # in the small grid: compiling takes ten seconds
USUAL, ENTROPIES = 0.5, (0.3, 1.0, 2.5, UNIFORM)  # nats


class Case(NamedTuple):
    op: str
    dtype: str
    shape: Shape
    nats: float
    contender: Contender

    def __str__(self) -> str:
        nats = "" if self.nats == USUAL else f"-{self.nats}nats"
        return f"{self.op}-{self.dtype}-{self.shape}{nats}-{self.contender.name}"


def grid(full: bool) -> list[Case]:
    """The cases, those of one batch together."""
    heads = [(SMALL, USUAL, HEAD_OPS)]
    if full:
        heads += [(shape, USUAL, HEAD_OPS) for shape in (SHAPES["small"], SHAPES["large"])]
        heads += [(SMALL, nats, ("train", "score")) for nats in ENTROPIES]
    return [
        Case(op, dtype, shape, nats, contender)
        for shape, nats, ops in heads
        for dtype in DTYPES
        for op in ops
        for contender in contenders(op)
        if full or not contender.compiles or (op in COMPILED and not contender.name.startswith("Liger"))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", grid(metafunc.config.getoption("grid") == "full"), ids=str)


_folder = cache(tempfile.TemporaryDirectory)


@cache
def _base(shape: Shape, dtype: str, nats: float):
    return draw(shape, DTYPES[dtype], nats)


@cache
def _prepared(op: str, dtype: str, shape: Shape, nats: float) -> tuple[Batch, Judge, str]:
    base, truth = _base(shape, dtype, nats)
    batch, ref_truth = for_op(op, base, truth)
    path = str(Path(_folder().name, f"{op}-{dtype}-{shape}-{nats}.pt"))
    batch.save(path)
    return batch, judge_for(op, batch, truth, ref_truth)[0], path


def test_head(benchmark, entered, case: Case):
    batch, judge, path = _prepared(case.op, case.dtype, case.shape, case.nats)
    benchmark.group = f"{case.op} {case.shape} {case.dtype}" + ("" if case.nats == USUAL else f" {case.nats} nats")
    about = {"op": case.op, "shape": str(case.shape), "dtype": case.dtype}
    row = entered(case.contender, batch, judge, about | ({} if case.nats == USUAL else {"nats": case.nats}))
    assert row["verdict"] == "ok" or case.contender.side != "ours"
    if row["verdict"] == "ok" and case.contender.side != "floor" and not case.contender.compiles:
        try:
            row["extra_bytes"] = memory.extra_bytes(path, case.op, case.contender.name, torch.get_num_threads())
        except (RuntimeError, OSError) as error:
            row["verdict"] = f"ok; memory unknown: {error}"
