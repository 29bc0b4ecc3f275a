"""The trainer's PPO update beside a version of itself that holds all logits: memory and time.

    python -m benchmarks.bench_trainer --out benchmarks/results/NAME.json     # about ten minutes on two cores

Memory is that of one update in a process of its own. Times are taken in turns in one process; ratios are paired by
round. Leave the machine alone while it runs. `pytest benchmarks/ --benchmark-only` runs a small size.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch

from benchmarks import place, report
from benchmarks.trainer_update import LOSSES, SIZES, Peak, World, peak, small_policy

RIVALS = ("materialised", "responses")
COLUMNS: dict[str, Callable[[Any], float]] = {  # seconds of the policy's step and of both, and of CPU
    "policy": lambda x: x[0], "update": lambda x: x[0] + x[1], "cpu": lambda x: x[2],
}  # fmt: skip
PARITY = 1e-4  # relative, of loss and gradient: float32 sums in another order


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


def memory(size: str, threads: int, repeats: int) -> list[dict[str, Any]]:
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
    lines = [
        "| loss | allocator | memory of the loss, MB | in all, MB | whole process, MB | of the loss, × ours | in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in run["memory"]:
        megabytes = " | ".join(f"{r[key] / 1e6:.0f}" for key in ("caused", "total", "process"))
        ratios = " | ".join(f"{r[key]:.2f}" if key in r else "" for key in ("loss_ratio", "total_ratio"))
        lines.append(f"| {r['loss']} | {r['allocator']} | {megabytes} | {ratios} |")
    lines += ["", "| loss | policy, s | update, s | CPU, s | ours / this, policy | update | CPU |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in run["times"]:
        cells = [f"{r[f'{key}_s']:.2f}" for key in COLUMNS]
        for key in COLUMNS:
            low, high = r.get(f"{key}_range", (0, 0))
            cells.append(f"{r[f'{key}_ratio']:.2f} ({low:.2f}–{high:.2f})" if high else "")
        lines.append(f"| {r['loss']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--rounds", type=int, default=7, help="of times; 0 takes none")
    parser.add_argument("--repeats", type=int, default=3, help="processes per loss and allocator; 0 takes no memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    run: dict[str, Any] = {"environment": report.environment(given.threads, None), "size": SIZES[given.size]._asdict()}
    world = World(SIZES[given.size])
    run["parity"] = parity(world)
    run["times"] = times(world, given.rounds) if given.rounds else []
    del world
    run["memory"] = memory(given.size, given.threads, given.repeats) if given.repeats else []
    if given.out:
        given.out.write_text(json.dumps(run, indent=1) + "\n")
    print(shown(run))


@cache
def _world(device: str) -> tuple[World, dict[str, float]]:
    """And how far its losses are apart."""
    world = World(SIZES["small"], small_policy(SIZES["small"]).to(place.place(device)))
    return world, parity(world)


@pytest.mark.parametrize("loss", LOSSES)
def test_update(benchmark: Any, timed: Any, in_time: Any, device: str, loss: str) -> None:
    if not in_time():
        pytest.skip("time is over")
    benchmark.group = f"PPO update {SIZES['small']}"
    world, apart = _world(device)
    benchmark.extra_info |= apart
    timed(lambda: world.update(LOSSES[loss]), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
