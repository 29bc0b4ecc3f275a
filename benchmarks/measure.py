"""Time contenders in turns, in one process, and hold each to the truth before anybody looks at its time."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.contenders import Contender, Step
from benchmarks.peers import Skipped

Row = dict[str, Any]
Judge = Callable[[Any], tuple[dict[str, float], str]]  # what a step returned -> errors, verdict
FEWEST, MOST = 3, 30
SLOW = 3.0  # from the third round on, whoever takes this many times the fastest's time sits out


def _timed(step: Step) -> tuple[float, Any]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def _enter(contender: Contender, batch: Any, judge: Judge) -> tuple[Row, Step | None]:
    """A contender's row with its first call, which compiles and warms up, and the step to time after it."""
    row: Row = {"contender": contender.name, "side": contender.side}
    try:
        step = contender.build(batch)
    except (ImportError, Skipped) as error:
        return row | {"verdict": f"skipped: {error if isinstance(error, Skipped) else brief(error)}"}, None
    try:
        first, result = _timed(step)
    except ImportError as error:  # some look for their own requirements only when they run
        return row | {"verdict": f"skipped: {brief(error)}"}, None
    except Exception as error:  # whatever a peer trips over belongs in its row, not in ours
        return row | {"verdict": f"failed: {brief(error)}"}, None
    errors, verdict = judge(result)
    return row | {"first_call_s": first, "compiles": contender.compiles, "errors": errors, "verdict": verdict}, step


def brief(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def _rounds(steps: dict[str, Step], seconds: float, rounds: int | None) -> dict[str, list[float]]:
    """A B C, A B C: a neighbour who wakes up disturbs a round, not a contender."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    spent, last, done = 0.0, 0.0, 0
    gc.collect()
    gc.freeze()  # the modules of all peers are a million objects to walk
    while done < (rounds or FEWEST) or (rounds is None and done < MOST and spent + last < seconds):
        gc.collect()
        last, limit = 0.0, SLOW * min(map(statistics.median, times.values())) if done >= 2 else float("inf")
        for name, step in steps.items():
            if times[name] and statistics.median(times[name]) > limit:
                continue
            taken, result = _timed(step)
            del result
            times[name].append(taken)
            last += taken
        spent, done = spent + last, done + 1
    gc.unfreeze()
    return times


def _relative(own: Sequence[float], other: Sequence[float]) -> float:
    """Median of the ratios of a round's times, over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(own, other, strict=False))


def table(
    contenders: Sequence[Contender], batch: Any, judge: Judge, *, seconds: float, rounds: int | None = None
) -> list[Row]:
    """One row a contender: times of the rounds in seconds, ratios paired by round, errors and verdict.

    ``to_floor`` is relative to the bare matrix products, ``to_peer`` to the fastest peer that is not wrong; below one
    is faster.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # every table compiles for its own shapes
    rows, steps = [], {}
    for contender in contenders:
        row, step = _enter(contender, batch, judge)
        rows.append(row)
        if step is not None:
            steps[contender.name] = step
    times = _rounds(steps, seconds, rounds)
    floor = next((times[r["contender"]] for r in rows if r["side"] == "floor" and r["contender"] in times), None)
    peers = [r["contender"] for r in rows if r["side"] == "peer" and r["verdict"] == "ok"]
    fastest = min(peers, key=lambda name: statistics.median(times[name]), default=None)
    for row in rows:
        own = times.get(row["contender"])
        if own is None:
            continue
        row |= {"median_s": statistics.median(own), "min_s": min(own), "max_s": max(own), "rounds": len(own)}
        if floor is not None:
            row["to_floor"] = _relative(own, floor)
        if fastest is not None:
            row |= {"to_peer": _relative(own, times[fastest]), "fastest_peer": fastest}
    return rows
