"""Losses and scores from hidden states, each contender at a shape that takes milliseconds.

    pytest benchmarks/ --benchmark-only                  # a small grid: every op, what compiles in some of them
    pytest benchmarks/ --benchmark-only --grid full      # an hour: larger shapes, four entropies, everybody everywhere

On a CPU memory is of a process a contender, where Linux tells it; on a GPU it is what torch's allocator has counted.
"""

from __future__ import annotations

import tempfile
import timeit
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.contenders.base import Contender
from benchmarks.contenders.roster import contenders
from benchmarks.measure import alone, place
from benchmarks.work.cases import DTYPES, HEAD_OPS, SHAPES, UNIFORM, Batch, Shape, draw, for_op
from benchmarks.work.judge import Judge, judge_for

SMALL = Shape(256, 256, 16384, ragged=True)
COMPILED = ("train", "score", "grpo", "dpo", "sft", "kl", "logits")  # in the small grid: compiling takes ten seconds
# The small grid of a GPU has less of what is no news there: kernels are compiled for whoever comes first.
COMPILED_ON_GPU, FLOAT32_ON_GPU = ("train", "score"), ("train", "score", "sft")
WITHOUT_BACKWARD = ("score", "logits")  # products that take a minute where bfloat16 has no hardware are not in these
USUAL, ENTROPIES = 0.5, (0.3, 1.0, 2.5, UNIFORM)  # nats
SLOW = 10.0  # times float32; a processor without such products takes 30 to 300


class Case(NamedTuple):
    op: str
    dtype: str
    shape: Shape
    nats: float
    contender: Contender

    def __str__(self) -> str:
        nats = "" if self.nats == USUAL else f"-{self.nats}nats"
        return f"{self.op}-{self.dtype}-{self.shape}{nats}-{self.contender.name}"


def grid(full: bool, device: str = "cpu", slow_halves: bool = False) -> list[Case]:
    """The cases, those of one batch together.

    Args:
        full: Everybody everywhere.
        device: Of the small grid, by its name.
        slow_halves: Products in bfloat16 take long, so that in the small grid only we make any.
    """
    heads = [(SMALL, USUAL, HEAD_OPS)]
    if full:
        heads += [(shape, USUAL, HEAD_OPS) for shape in (SHAPES["small"], SHAPES["large"])]
        heads += [(SMALL, nats, ("train", "score")) for nats in ENTROPIES]
    cuda = device == "cuda"

    def wanted(dtype: str, op: str, contender: Contender) -> bool:
        if contender.compiles:
            here = dtype == "bf16" and op in COMPILED_ON_GPU if cuda else op in COMPILED
            return here and not contender.name.startswith("Liger") and not (slow_halves and dtype == "bf16")
        if cuda:
            return dtype == "bf16" or op in FLOAT32_ON_GPU
        return dtype == "fp32" or not slow_halves or contender.side == "ours" or op in WITHOUT_BACKWARD

    return [
        Case(op, dtype, shape, nats, contender)
        for shape, nats, ops in heads
        for dtype in sorted(DTYPES, reverse=not cuda)  # The device's own dtype comes first: time may run out.
        for op in ops
        for contender in contenders(op)
        if full or wanted(dtype, op, contender)
    ]


@cache
def slow_halves() -> bool:
    """Whether torch's products in bfloat16 take much longer than those in float32: some processors have none."""
    seconds = {}
    for dtype in DTYPES.values():
        a, b = torch.ones(64, 2048, dtype=dtype), torch.ones(2048, 256, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a, b=b: a @ b, number=1, repeat=8))
    return seconds[torch.bfloat16] > SLOW * seconds[torch.float32]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device, full = (
            place.chosen(str(metafunc.config.getoption("device"))),
            metafunc.config.getoption("grid") == "full",
        )
        cases = grid(full, device, slow_halves=not full and device == "cpu" and slow_halves())
        metafunc.parametrize("case", cases, ids=str)


_folder = cache(tempfile.TemporaryDirectory)


@cache
def _base(shape: Shape, dtype: str, nats: float, device: str):
    return draw(shape, DTYPES[dtype], nats, device=place.place(device))


@cache
def _prepared(op: str, dtype: str, shape: Shape, nats: float, device: str) -> tuple[Batch, Judge, str]:
    base, truth = _base(shape, dtype, nats, device)
    batch, ref_truth = for_op(op, base, truth)
    path = str(Path(_folder().name, f"{op}-{dtype}-{shape}-{nats}.pt"))
    if device == "cpu":
        batch.save(path)
    return batch, judge_for(op, batch, truth, ref_truth)[0], path


def test_head(benchmark, entered, in_time, device, case: Case):
    benchmark.group = f"{case.op} {case.shape} {case.dtype}" + ("" if case.nats == USUAL else f" {case.nats} nats")
    about = {"op": case.op, "shape": str(case.shape), "dtype": case.dtype}
    about |= {} if case.nats == USUAL else {"nats": case.nats}
    asked = (case.op, case.dtype, case.shape, case.nats, device)
    batch, judge, path = _prepared(*asked) if in_time() else (None, None, "")
    row = entered(case.contender, batch, judge, about)
    assert row["verdict"] == "ok" or case.contender.side != "ours"
    by_itself = case.contender.side != "floor" and not case.contender.compiles and device == "cpu"
    if by_itself and row["verdict"] == "ok" and in_time():
        saved, threads = partial(Batch.load, path), torch.get_num_threads()
        try:
            row["extra_bytes"] = alone.extra_bytes(saved, case.op, case.contender.name, threads)
        except (RuntimeError, OSError) as error:
            row["verdict"] = f"ok; memory unknown: {error}"
