"""Peers on a GPU: everybody in turns with the bare products, in one process, each held to float64.

A table for each kind of work and head. Beside a contender's milliseconds stand its memory beyond inputs and gradients
and its largest errors; all is drawn on the device, and float64 is computed there in chunks. Nothing is compiled by
torch and nothing is profiled. Peers are those installed, unpacked (RLHF_KERNELS_PEERS) or carried.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.contenders.base import Contender, Step, brief
from benchmarks.contenders.roster import contenders
from benchmarks.gpu.context import Context
from benchmarks.gpu.stages.clock import in_turns
from benchmarks.measure import memory
from benchmarks.measure.turns import Row, Times, enter, ranked
from benchmarks.work.cases import Batch, Shape, draw, for_op
from benchmarks.work.judge import Judge, judge_for
from benchmarks.work.truth import Truth

ROUNDS = 10
SECONDS = 10.0  # for the rounds of one table, after its first three
SLOW = 1.5  # seconds of a call that is measured once and sits the rounds out; an interpreter takes as long as it takes
LEAST = 12.0  # seconds that a table takes at least


class Kind(NamedTuple):
    """One kind of work."""

    name: str
    op: str  # one of the names in benchmarks.work.cases
    whole: bool = False  # no row is prompt and every row has a gradient


PPO, SCORE = Kind("PPO", "sparse", whole=True), Kind("scoring", "score")
ALL = (
    PPO, Kind("PPO, half prompt, 30 % of the kept rows idle", "sparse_kept"), SCORE, Kind("SFT, half prompt", "sft"),
    Kind("GRPO", "grpo"), Kind("DPO, half prompt", "dpo_prompts"), Kind("exact KL, half prompt", "kl"),
)  # fmt: skip
PLAN = ((Shape(8192, 4096, 151936), (PPO, SCORE)), (Shape(8192, 896, 151936), ALL))
TINY = ((Shape(32, 128, 512, sequences=4), ALL),)  # verl's kernels want hidden sizes that 128 divides


def run(ctx: Context) -> None:
    for shape, kinds in TINY if ctx.dry else PLAN:
        drawn: tuple[Batch, Truth] | None = None
        for kind in kinds:
            what = f"{kind.name}, {shape}"
            if ctx.left() < LEAST and not ctx.dry:
                ctx.cut(what)
                continue
            with ctx.attempt(what):
                if drawn is None:
                    drawn = draw(shape, torch.bfloat16, device=ctx.place)
                table(ctx, kind, shape, *drawn)
            free()


def table(ctx: Context, kind: Kind, shape: Shape, base: Batch, truth: Truth) -> None:
    """One row a contender."""
    batch, ref_truth = for_op(kind.op, base, truth)
    if kind.whole:
        idle = base.advantages == 0
        batch = replace(batch, kept=torch.ones_like(batch.kept), advantages=base.advantages.masked_fill(idle, 1.0))
    judge, _ = judge_for(kind.op, batch, truth, ref_truth)
    rows, steps = [], {}
    for contender in (c for c in contenders(kind.op, None, ctx.backend) if not c.compiles):
        row, step = first_calls(contender, batch, judge)
        rows.append(row)
        if step is not None:
            steps[contender.name] = step
    guarded = {name: Guarded(step) for name, step in steps.items()}
    until = time.monotonic() + (0 if ctx.dry else SECONDS)
    milliseconds = in_turns(dict(guarded), ROUNDS, lambda: min(ctx.left(), until - time.monotonic()))
    times: Times = {
        name: [(ms / 1e3, None) for ms in found] for name, found in milliseconds.items() if not guarded[name].failed
    }
    for row in ranked(rows, times):
        failed = guarded[row["contender"]].failed if row["contender"] in guarded else ""
        ctx.row(work=kind.name, shape=str(shape), **cells(row, failed))


def first_calls(contender: Contender, batch: Batch, judge: Judge) -> tuple[Row, Step | None]:
    """A contender's row after a call that compiles and is judged, and one whose memory is measured."""
    row, step = enter(contender, batch, judge, profiled=False)
    if step is None:
        free()  # what had no room holds its memory until then
        return row, None
    try:
        row["extra_mb"] = memory.extra(step, cuda=True) / 1e6
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        row["second_s"] = time.perf_counter() - began
    except Exception as error:
        free()
        return row | {"verdict": f"failed: {brief(error)}"}, None
    return row, step if row["second_s"] < SLOW or contender.side != "peer" else None


class Guarded:
    """A step that may fail in a round without ending the others'."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step, self.failed = step, ""

    def __call__(self) -> None:
        if self.failed:
            return
        try:
            self.step()
        except Exception as error:
            self.failed = brief(error)
        if self.failed:
            free()


def cells(row: Row, failed: str) -> Row:
    """What a row says to the log and the file; seconds become milliseconds. Only what is ours can fail the run."""
    kept = {key: row[key] for key in ("contender", "side")}
    verdict = f"failed: {failed}" if failed else row["verdict"]
    if verdict.startswith("skipped: "):
        return kept | {"skipped": verdict.removeprefix("skipped: ")}
    if verdict != "ok" and row["side"] != "peer":
        kept["failed"] = verdict.removeprefix("failed: ")
    if verdict.startswith("failed: "):
        return kept | {"verdict": verdict}
    if "median_s" in row:
        kept |= {"ms": 1e3 * row["median_s"], "least": 1e3 * row["min_s"], "most": 1e3 * row["max_s"]}
        kept |= {"rounds": row["rounds"]}
    else:  # too slow for the rounds
        kept |= {"ms": 1e3 * row["second_s"], "rounds": 1}
    names = {"to_floor": "over_floor", "to_peer": "over_fastest_peer", "fastest_peer": "fastest_peer"}
    kept |= {new: row[old] for old, new in names.items() if old in row}
    note = {"note": "its loss is another with the same gradient"} if "score centering" in row["contender"] else {}
    return kept | {"extra_mb": row["extra_mb"], "verdict": verdict, "errors": row["errors"]} | note


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
