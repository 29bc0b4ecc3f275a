"""Are we slower or larger than we were? Compares with a committed baseline.

    python -m benchmarks check             # two minutes; exit status 1 if anything got worse
    python -m benchmarks check --write     # makes a new baseline

Speed is our time over that of plain torch, in turns in one process and in seconds of this process on a CPU, so that a
busy hour changes little; it is not for CI. Memory is counted, not sampled: the bytes that torch's operators hand out,
the same in every run of one backend with one torch on CPUs of one kind.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import command
from benchmarks.contenders import gae
from benchmarks.contenders.roster import contenders
from benchmarks.measure.memory import Allocations
from benchmarks.report import environment
from benchmarks.report.kernel_hash import RESULTS
from benchmarks.report.tables import grid
from benchmarks.work.cases import DTYPES, Shape, draw, for_op
from benchmarks.work.replies import Replies
from benchmarks.work.update import LOSSES, SIZES, World
from rlhf_kernels.backends import resolve

BASELINE = RESULTS / "baseline-cpu.json"
SLOWER, LARGER = 0.15, 0.01
SHAPE = Shape(512, 256, 16384)
BUDGET = 8 * 2**20  # of the calls whose memory is counted: a quarter of their logits
RIVAL, GAE_RIVAL = "torch, materialised", "chunked matmul in torch, after slime"
MATTERS: dict[str, Callable[[dict[str, Any]], Any]] = {  # of an environment, to numbers that are to be compared
    "versions": lambda e: {name: e["versions"][name] for name in ("torch", "transformers")},
    "cpu_flags": lambda e: e["cpu_flags"],
    "backend": lambda e: e["backend"],
    "threads": lambda e: e["threads"],
}


class Measured(NamedTuple):
    """One case: our time over plain torch's, and the most bytes that were alive at once."""

    ratio: float
    bytes: int


class Row(NamedTuple):
    """One case then and now, and what got worse."""

    name: str
    was: Measured | None
    now: Measured
    worse: list[str]
    better: list[str]


Step = Callable[[], Any]


class Case(NamedTuple):
    """What is timed, against what, and what has its memory counted."""

    ours: Step
    rival: Step
    counted: Step


def ratio(case: Case, rounds: int) -> float:
    """Our seconds over the rival's, the median of the rounds."""

    def seconds(step: Step) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    for step in (case.ours, case.rival):
        step()
    return round(statistics.median(seconds(case.ours) / seconds(case.rival) for _ in range(rounds)), 4)


def peak(case: Case) -> int:
    """The most bytes that were alive at once, in a call that is not the first."""
    case.counted()
    with Allocations() as seen:
        case.counted()
    return seen.peak


@cache
def _drawn(dtype: str) -> Any:
    return draw(SHAPE, DTYPES[dtype])


def _head(op: str, dtype: str) -> Case:
    batch, _ = for_op(op, *_drawn(dtype))
    field = contenders(op)
    ours, counted = (
        [c for c in found if c.side == "ours"][-1].build(batch) for found in (field, contenders(op, BUDGET))
    )
    return Case(ours, next(c for c in field if c.name == RIVAL).build(batch), counted)


def _gae() -> Case:
    batch = Replies.draw(64, 2048)
    ours, rival = (next(c for c in gae.CONTENDERS if c.name == name).build(batch) for name in ("rk.gae", GAE_RIVAL))
    return Case(ours, rival, ours)


def _update() -> Case:
    world = World(SIZES["small"])
    ours, rival = (lambda name=name: world.update(LOSSES[name]) for name in ("ours", "responses"))
    return Case(ours, rival, ours)


CASES: dict[str, Callable[[], Case]] = {
    f"{op} {dtype}": lambda op=op, dtype=dtype: _head(op, dtype)
    for op in ("train", "score", "grpo", "dpo", "sparse_kept")
    for dtype in DTYPES
} | {"gae": _gae, "PPO update": _update}


def measure(name: str, rounds: int) -> Measured:
    """One of ``CASES``."""
    case = CASES[name]()
    return Measured(ratio(case, rounds), peak(case))


def here(threads: int) -> dict[str, Any]:
    """Where this runs, and on which backend."""
    backend = resolve("auto", torch.device("cpu"), torch.float32)
    return environment.environment(threads) | {"backend": getattr(backend, "__name__", "")}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Why numbers of one environment may differ from those of another; nothing if they may not."""
    pairs = [(name, of(there), of(here)) for name, of in MATTERS.items()]
    return [f"{name} of the baseline: {then}; here: {now}" for name, then, now in pairs if then != now]


def compare(
    baseline: Mapping[str, Measured], names: Sequence[str], measure: Callable[[str], Measured], tries: int = 3
) -> list[Row]:
    """One row a case.

    Args:
        baseline: What was.
        names: The cases to look at.
        measure: Says what is.
        tries: Whoever seems slower is measured again; a regression is slower every time.
    """
    rows = []
    for name in names:
        was, now = baseline.get(name), measure(name)
        for _ in range(tries - 1):
            if was is None or now.ratio <= was.ratio * (1 + SLOWER):
                break
            now = now._replace(ratio=min(now.ratio, measure(name).ratio))
        worse, better = [], []
        if was is not None:
            for up, down, old, new, most in (
                ("slower", "faster", was.ratio, now.ratio, SLOWER), ("larger", "smaller", was.bytes, now.bytes, LARGER)
            ):  # fmt: skip
                change = new / old - 1
                if change > most:
                    worse.append(f"{change:.1%} {up}, {most:.0%} are allowed")
                elif change < -most:
                    better.append(f"{-change:.1%} {down}")
        rows.append(Row(name, was, now, worse, better))
    return rows


def shown(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = []
    for name, was, now, worse, better in rows:
        old = ("", "") if was is None else (f"{was.ratio:.2f}", f"{was.bytes / 1e6:.2f}")
        note = "; ".join([f"**{w}**" for w in worse] + better) if was else "new: not in the baseline"
        lines.append((name, old[0], f"{now.ratio:.2f}", old[1], f"{now.bytes / 1e6:.2f}", note))
    return grid(("case", "ours / torch, was", "is", "counted MB, was", "is", ""), lines)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Environment and measurements of a baseline.

    Raises:
        ValueError: It is not there.
    """
    if not path.exists():
        raise ValueError(f"baseline: there is no {path}; --write makes one")
    found = json.loads(path.read_text())
    return found["environment"], {name: Measured(**m) for name, m in found["measured"].items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("check", __doc__)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--write", action="store_true", help="a new baseline instead of a comparison")
    parser.add_argument("--only", action="append", choices=CASES, help="this case only; may be repeated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tries", type=int, default=3, help="measurements before a case counts as slower")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    if given.write and given.only:
        parser.error("--only: got a part of the cases, want all of them in a baseline")
    torch.set_num_threads(given.threads)
    now = here(given.threads)
    try:
        there, baseline = (now, {}) if given.write else read(given.baseline)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for difference in differences(there, now):
        print(f"note: {difference}", file=sys.stderr)
    rows = compare(baseline, given.only or list(CASES), lambda name: measure(name, given.rounds), given.tries)
    print(shown(rows))
    if given.write:
        measured = {row.name: row.now._asdict() for row in rows}
        environment.write(given.baseline, {"environment": now, "measured": measured})
        return 0
    if any(row.better for row in rows):
        print("better than the baseline, which should be written anew so that this is kept", file=sys.stderr)
    return int(any(row.worse for row in rows))
