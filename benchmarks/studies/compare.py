"""This library beside its peers: time, memory and error of each, in one process and in turns.

    python -m benchmarks compare                # every op at the small shape, train and score at the large one
    python -m benchmarks compare --quick        # the small shape only
    python -m benchmarks compare --full         # every op at both shapes, with memory
    python -m benchmarks compare --full --shape large --dtype fp32 --only dpo --out dpo.json    # a part of that
    python -m benchmarks compare --shape qwen3-8b --tokens 8192 --device cuda --dtype bf16      # a model's head
    python -m benchmarks compare --quick --nats 0.3 --nats 1 --nats 2.5 --nats uniform          # how peaked
    python -m benchmarks compare --text replies.jsonl.gz      # logits of a small model trained on this text

Markdown to stdout, everything to --out; `report` prints several such files together. Leave the machine alone
while it runs: on two cores ten minutes, half an hour with --full.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.contenders import gae
from benchmarks.contenders.base import Contender
from benchmarks.contenders.roster import contenders, without
from benchmarks.measure import alone
from benchmarks.measure.turns import Row, table
from benchmarks.report import environment, tables
from benchmarks.report.kernel_hash import hashes
from benchmarks.work import replies, text
from benchmarks.work.cases import DTYPES, HEAD_OPS, MODELS, SHAPES, Batch, Shape, draw, for_op, shape_of
from benchmarks.work.judge import judge_for
from benchmarks.work.truth import Truth

OPS = (*HEAD_OPS, "gae")
REPLIES = {"tiny": (4, 300)}  # replies x tokens of gae; every other shape has the real one
REAL_REPLIES = (128, 4096)
USUAL = 0.5  # nats
MEMORY_OPS = {
    "none": (),
    "train": ("train",),
    "all": ("train", "score", "grpo", "dpo", "kl", "sft", "sparse"),
    "every": HEAD_OPS,
}


def compare(
    op: str, batch: Batch, truth: Truth, ref_truth: Truth | None, entrants: Sequence[Contender], *,
    seconds: float, rounds: int | None = None,
) -> list[Row]:  # fmt: skip
    """Rows of one table: these contenders on this batch, judged by the truth about it."""
    judge, zero_rows = judge_for(op, batch, truth, ref_truth)
    rows = table(entrants, batch, judge, seconds=seconds, rounds=rounds)
    return rows if zero_rows is None else [row | {"zero_gradient_rows": zero_rows} for row in rows]


def compare_gae(shape: str, skip: Sequence[str], device: str, *, seconds: float, rounds: int | None) -> list[Row]:
    """Rows of the table of advantages."""
    size = REPLIES.get(shape, REAL_REPLIES)
    batch = replies.Replies.draw(*size, device)
    rows = table(without(gae.CONTENDERS, skip), batch, replies.judge_for(batch), seconds=seconds, rounds=rounds)
    return [row | {"op": "gae", "shape": "x".join(map(str, size)), "dtype": "fp32"} for row in rows]


def measure_memory(rows: list[Row], op: str, batch: Batch, threads: int, max_bytes: int | None) -> None:
    """Fill in ``extra_bytes`` on a CPU, each contender in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "batch.pt"))
        batch.save(path)
        saved = partial(Batch.load, path)
        for row in rows:
            if row["side"] == "floor" or row["verdict"] != "ok":
                continue
            try:
                row["extra_bytes"] = alone.extra_bytes(saved, op, row["contender"], threads, max_bytes)
            except (RuntimeError, OSError) as error:
                row["verdict"] = f"ok; memory unknown: {error}"


def _plan(given: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """(shape, dtype, ops) of the tables to make."""
    for shape in [given.shape] if given.shape else ["small"] if given.quick else ["small", "large"]:
        for dtype in [given.dtype] if given.dtype else list(DTYPES):
            # minutes each at the large shape: there only on request
            few = shape == "large" and not given.full
            wanted = given.only or [op for op in HEAD_OPS if not few or op in ("train", "score")]
            yield shape, dtype, [op for op in wanted if op in HEAD_OPS]


def _drawn(given: argparse.Namespace) -> Iterator[tuple[Row, Batch, Truth, list[str]]]:
    """What each table is of, its batch and ops; the heads one after the other, since they are large."""
    for name, dtype, ops in _plan(given):
        if not ops:
            continue
        if given.text:
            batch, truth = text.batch_of(given.text, DTYPES[dtype], tokens=given.tokens or 1024, device=given.device)
            about = {
                "shape": str(Shape(len(batch.hidden), batch.hidden.shape[1], len(batch.weight))),
                "text": given.text.name,
            }
            yield about | {"dtype": dtype, "nats": truth.entropy.mean().item()}, batch, truth, ops
            continue
        shape = shape_of(name, given.tokens)
        shape = replace(shape, ragged=shape.ragged or given.ragged)
        for nats in given.nats:
            batch, truth = draw(shape, DTYPES[dtype], nats, device=given.device)
            about = {"shape": str(shape), "dtype": dtype} | ({"model": name} if name in MODELS else {})
            entropy = {} if given.nats == [USUAL] else {"nats": truth.entropy.mean().item()}
            yield about | entropy, batch, truth, ops


def run(given: argparse.Namespace) -> Iterator[list[Row]]:
    """The tables one by one."""
    for about, base, truth, ops in _drawn(given):
        for op in ops:
            batch, ref_truth = for_op(op, base, truth)
            entrants = without(contenders(op, given.max_bytes), given.skip)
            rows = compare(op, batch, truth, ref_truth, entrants, seconds=given.seconds, rounds=given.rounds)
            if op in MEMORY_OPS[given.memory] and given.device == "cpu":
                measure_memory(rows, op, batch, given.threads, given.max_bytes)
            yield [row | {"op": op} | about for row in rows]
    if not given.only or "gae" in given.only:
        yield compare_gae(given.shape or "large", given.skip, given.device, seconds=given.seconds, rounds=given.rounds)


def _nats(told: str) -> float:
    return math.inf if told == "uniform" else float(told)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("compare", __doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the small shape only, few rounds")
    size.add_argument("--full", action="store_true", help="every op at both shapes, more rounds, memory")
    parser.add_argument("--only", action="append", choices=OPS, help="this op only; may be repeated")
    parser.add_argument("--shape", choices=[*SHAPES, *MODELS], help="a model's head is given ragged sequences")
    parser.add_argument("--tokens", type=int, help="instead of the shape's own")
    parser.add_argument("--ragged", action="store_true", help="sequences of different lengths")
    parser.add_argument("--nats", action="append", type=_nats, help="mean entropy, or 'uniform'; may be repeated")
    parser.add_argument("--text", type=Path, help="jsonl or jsonl.gz to train a small model on, whose logits are used")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--skip", action="append", default=[], help="leave out contenders whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="instead of as many as fit --seconds, at least 3")
    parser.add_argument("--seconds", type=float, help="time for the rounds of one table")
    parser.add_argument("--memory", choices=MEMORY_OPS, help="peak memory of these ops, a process a contender")
    parser.add_argument("--max-bytes", type=int, help="our byte budget; the default is the library's")
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args(argv)
    given.seconds = given.seconds or (3.0 if given.quick else 20.0 if given.full else 8.0)
    given.memory = given.memory or ("all" if given.full else "none")
    given.nats = given.nats or [USUAL]
    given.shape = "small" if given.text else given.shape
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = _arguments(argv)
    torch.set_num_threads(given.threads)
    here = environment.environment(given.threads, given.max_bytes, given.device)
    run_of: Row = {"environment": here} | ({} if given.device == "cpu" else {"sources": hashes()})
    print(tables.heading(here), end="\n\n", flush=True)
    rows: list[Row] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as empty:
        # nothing compiled in an earlier run may shorten a first call
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", empty)
        for group in run(given):
            print(tables.markdown(group), end="\n\n", flush=True)
            rows += group
            environment.write(given.out, run_of | {"rows": rows})
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
