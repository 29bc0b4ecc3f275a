"""Time contenders in turns, in one process, and hold each to the truth before anybody looks at its time."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.contenders.base import Contender, Skipped, Step, brief
from benchmarks.measure import memory
from benchmarks.work.judge import Judge

Row = dict[str, Any]
FEWEST, MOST = 3, 30
SLOW = 3.0  # from the third round on, whoever takes this many times the fastest's time sits out


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _timed(step: Step, cuda: bool) -> tuple[float, Any]:
    _wait(cuda)
    start = time.perf_counter()
    result = step()
    _wait(cuda)
    return time.perf_counter() - start, result


def forward_seconds(result: Any) -> float | None:
    """Of the part before the gradients, where a contender has one."""
    part = getattr(result, "forward_s", None)
    return None if part is None else part()


def enter(contender: Contender, batch: Any, judge: Judge, *, profiled: bool = True) -> tuple[Row, Step | None]:
    """A contender's row with its first call, which compiles and warms up, and the step to time after it.

    ``profiled``: on a GPU, with what only a profiler can tell.
    """
    row: Row = {"contender": contender.name, "side": contender.side}
    cuda = on_cuda(batch)
    try:
        step = contender.build(batch)
    except (ImportError, Skipped) as error:
        return row | {"verdict": f"skipped: {error if isinstance(error, Skipped) else brief(error)}"}, None
    except Exception as error:  # half-installed peers fail in many ways
        return row | {"verdict": f"failed: {brief(error)}"}, None
    try:
        first, result = _timed(step, cuda)
        errors, verdict = judge(result)
    except ImportError as error:  # some look for their own requirements only when they run
        return row | {"verdict": f"skipped: {brief(error)}"}, None
    except Exception as error:  # whatever a peer trips over belongs in its row, not in ours
        return row | {"verdict": f"failed: {brief(error)}"}, None
    row |= {"first_call_s": first, "compiles": contender.compiles, "errors": errors, "verdict": verdict}
    if cuda and profiled:
        del result
        row |= _on_device(step)
    return row, step


def on_cuda(batch: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in (batch if isinstance(batch, tuple) else [
        getattr(batch, "hidden", None)
    ]))  # fmt: skip


def _on_device(step: Step) -> Row:
    """What only a GPU can tell: peak memory, kernels launched, waits of the host."""
    from torch.profiler import ProfilerActivity, profile

    extra = memory.extra(step, cuda=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        result = step()
    del result
    names = [event.name for event in seen.events() or ()]
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names)
    # leaving the profiler waits once itself
    waits = sum("Synchronize" in name for name in names)
    return {"extra_bytes": extra, "launches": launches, "host_syncs": max(waits - 1, 0)}


Times = dict[str, list[tuple[float, float | None]]]  # by contender: seconds in all, and of the forward


def in_turns(
    steps: dict[str, Step], *, seconds: float = 0.0, rounds: int | None = None, cuda: bool = False, slow: float = SLOW
) -> Times:
    """A B C, A B C: a neighbour who wakes up disturbs a round, not a contender.

    Args:
        steps: By name.
        seconds: For all rounds, which are at least three.
        rounds: Instead of that.
        cuda: Each is waited for.
        slow: Who takes so many times the fastest's time sits out from the third round on.
    """
    times: Times = {name: [] for name in steps}
    spent, last, done = 0.0, 0.0, 0
    gc.collect()
    gc.freeze()  # the modules of all peers are a million objects to walk
    while done < (rounds or FEWEST) or (rounds is None and done < MOST and spent + last < seconds):
        gc.collect()
        last, limit = 0.0, slow * min(map(_median, times.values())) if done >= 2 else float("inf")
        for name, step in steps.items():
            if times[name] and _median(times[name]) > limit:
                continue
            taken, result = _timed(step, cuda)
            times[name].append((taken, forward_seconds(result)))
            del result
            last += taken
        spent, done = spent + last, done + 1
    gc.unfreeze()
    return times


def _median(times: Sequence[tuple[float, float | None]]) -> float:
    return statistics.median(total for total, _ in times)


def _relative(own: Sequence[float], other: Sequence[float]) -> float:
    """Median of the ratios of a round's times, over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(own, other, strict=False))


def ranked(rows: list[Row], times: Times) -> list[Row]:
    """The rows with their times, seconds; and ratios paired by round.

    ``to_floor`` is relative to the bare matrix products, ``to_peer`` to the fastest peer that is not wrong; below one
    is faster.
    """
    floor = next((r["contender"] for r in rows if r["side"] == "floor" and times.get(r["contender"])), None)
    peers = [r["contender"] for r in rows if r["side"] == "peer" and r["verdict"] == "ok" and times.get(r["contender"])]
    fastest = min(peers, key=lambda name: _median(times[name]), default=None)
    totals = {name: [total for total, _ in found] for name, found in times.items()}
    for row in rows:
        own = totals.get(row["contender"])
        if not own:
            continue
        row |= {"median_s": statistics.median(own), "min_s": min(own), "max_s": max(own), "rounds": len(own)}
        parts = [(total, first) for total, first in times[row["contender"]] if first is not None]
        if parts:
            row["forward_s"] = statistics.median(first for _, first in parts)
            row["backward_s"] = statistics.median(total - first for total, first in parts)
        if floor is not None:
            row["to_floor"] = _relative(own, totals[floor])
        if fastest is not None:
            row |= {"to_peer": _relative(own, totals[fastest]), "fastest_peer": fastest}
    return rows


def table(
    contenders: Sequence[Contender], batch: Any, judge: Judge, *, seconds: float, rounds: int | None = None
) -> list[Row]:
    """One row a contender: times of the rounds, errors and verdict; see ``ranked``."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # every table compiles for its own shapes
    rows, steps = [], {}
    for contender in contenders:
        row, step = enter(contender, batch, judge)
        rows.append(row)
        if step is not None:
            steps[contender.name] = step
    return ranked(rows, in_turns(steps, seconds=seconds, rounds=rounds, cuda=on_cuda(batch)))
