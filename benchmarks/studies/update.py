"""The trainer's PPO update beside a version of itself that holds all logits: memory and time.

    python -m benchmarks update --out benchmarks/results/NAME.json     # about ten minutes on two cores

Memory is that of one update in a process of its own. Times are taken in turns in one process; ratios are paired by
round. Leave the machine alone while it runs. `pytest benchmarks/ --benchmark-only` runs a small size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch

from benchmarks import command
from benchmarks.measure import memory
from benchmarks.report.environment import environment, write
from benchmarks.report.tables import grid
from benchmarks.work.update import LOSSES, SIZES, World, ours

RIVALS = ("materialised", "responses")
COLUMNS: dict[str, Callable[[Any], float]] = {  # seconds of the policy's step and of both, and of CPU
    "policy": lambda x: x[0], "update": lambda x: x[0] + x[1], "cpu": lambda x: x[2],
}  # fmt: skip
PARITY = 1e-4  # relative, of loss and gradient: float32 sums in another order


class Peak(NamedTuple):
    """Resident bytes of one update at its highest."""

    total: int  # beyond the interpreter and its libraries: weights, optimizer states, gradients, activations, loss
    process: int  # all of it


def parity(world: World) -> dict[str, float]:
    """Largest relative differences between our loss or gradient and those of the rivals.

    Raises:
        RuntimeError: They do not compute the same thing, so that a comparison would mean nothing.
    """
    loss, gradient = world.gradient(LOSSES["ours"])
    found: dict[str, float] = {}
    for name in RIVALS:
        other, theirs = world.gradient(LOSSES[name])
        found[f"{name}, loss"] = abs(loss - other) / max(abs(other), 1e-3)
        found[f"{name}, gradient"] = float((gradient - theirs).norm() / theirs.norm())
    if max(found.values()) > PARITY:
        raise RuntimeError(f"the updates differ by {found}, want at most {PARITY}")
    return found


def peak(loss: str, size: str, threads: int, *, live: bool) -> Peak:
    """Of one update in a process of its own.

    Args:
        loss: One of ``LOSSES``.
        size: One of ``SIZES``.
        threads: Of torch.
        live: Let glibc give freed blocks back at once, so that resident memory is memory in use, and the same in every
            run; otherwise it keeps some for later, more or less of them as it happens.

    Raises:
        RuntimeError: The other process failed.
    """
    return memory.elsewhere(_measured, loss, size, threads, live)


def _measured(loss: str, size: str, threads: int, live: bool) -> Peak:
    torch.set_num_threads(threads)
    if live:
        memory.give_back()
    base = memory.resident("VmRSS")
    world = World(SIZES[size])
    # States of Adam and workspaces of threads exist before the update that counts, whatever its loss.
    world.update(ours, world.rollout.select([0]))
    memory.forget_the_past()
    world.update(LOSSES[loss])
    highest = memory.resident("VmHWM")
    return Peak(highest - base, highest)


def peaks(size: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Peaks of every loss under both ways of the allocator; the least of ``repeats`` runs, and all of them."""
    rows = []
    for live in (True, False):
        runs: dict[str, list[Peak]] = {name: [] for name in LOSSES}
        for _ in range(repeats):
            for name in LOSSES:
                runs[name].append(peak(name, size, threads, live=live))
        least = {name: Peak(*map(min, zip(*found, strict=True))) for name, found in runs.items()}
        for name, found in least.items():
            row = {"allocator": "gives back" if live else "default", "loss": name} | found._asdict()
            row["caused"] = found.total - least["none"].total
            if name in RIVALS:
                row["loss_ratio"] = row["caused"] / max(least["ours"].total - least["none"].total, 1)
                row["total_ratio"] = found.total / least["ours"].total
                row["process_ratio"] = found.process / least["ours"].process
            rows.append(row | {"runs": [p.total for p in runs[name]]})
    return rows


def times(world: World, rounds: int) -> list[dict[str, Any]]:
    """Seconds per update in turns, after one round to warm up; ours over each rival, the median of the rounds."""
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in LOSSES}
    for turn in range(rounds + 1):
        for name, loss in LOSSES.items():
            began = process_time()
            found = world.update(loss)
            if turn:
                taken[name].append((*found, process_time() - began))
    rows = []
    for name, found in taken.items():
        row: dict[str, Any] = {"loss": name, "runs": found}
        row |= {f"{key}_s": statistics.median(map(of, found)) for key, of in COLUMNS.items()}
        if name in RIVALS:
            for key, of in COLUMNS.items():
                ratios = sorted(of(a) / of(b) for a, b in zip(taken["ours"], found, strict=True))
                row |= {f"{key}_ratio": statistics.median(ratios), f"{key}_range": (ratios[0], ratios[-1])}
        rows.append(row)
    return rows


def shown(run: dict[str, Any]) -> str:
    """As Markdown."""
    held, timed = [], []
    for r in run["memory"]:
        megabytes = [f"{r[key] / 1e6:.0f}" for key in ("caused", "total", "process")]
        ratios = [f"{r[key]:.2f}" if key in r else "" for key in ("loss_ratio", "total_ratio")]
        held.append((r["loss"], r["allocator"], *megabytes, *ratios))
    for r in run["times"]:
        cells = [f"{r[f'{key}_s']:.2f}" for key in COLUMNS]
        for key in COLUMNS:
            low, high = r.get(f"{key}_range", (0, 0))
            cells.append(f"{r[f'{key}_ratio']:.2f} ({low:.2f}–{high:.2f})" if high else "")
        timed.append((r["loss"], *cells))
    memory_of = ("memory of the loss, MB", "in all, MB", "whole process, MB", "of the loss, × ours", "in all")
    times_of = ("policy, s", "update, s", "CPU, s", "ours / this, policy", "update", "CPU")
    return grid(("loss", "allocator", *memory_of), held) + "\n\n" + grid(("loss", *times_of), timed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser("update", __doc__)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--rounds", type=int, default=7, help="of times; 0 takes none")
    parser.add_argument("--repeats", type=int, default=3, help="processes per loss and allocator; 0 takes no memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    run: dict[str, Any] = {"environment": environment(given.threads), "size": SIZES[given.size]._asdict()}
    world = World(SIZES[given.size])
    run["parity"] = parity(world)
    run["times"] = times(world, given.rounds) if given.rounds else []
    del world
    run["memory"] = peaks(given.size, given.threads, given.repeats) if given.repeats else []
    write(given.out, run)
    print(shown(run))
