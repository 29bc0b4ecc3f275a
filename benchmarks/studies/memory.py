"""Peak memory of a loss against the number of tokens, up to a million: forward and backward, in a process each.

    python -m benchmarks memory --out curve.json

What a contender would need beyond this machine's memory is not run: the row says so and has no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.contenders.roster import contenders, without
from benchmarks.measure import alone
from benchmarks.measure.turns import Row
from benchmarks.report import environment
from benchmarks.work.cases import Batch

TOKENS = (1024, 4096, 16384, 65536, 262144, 1048576)
HIDDEN, VOCAB = 32, 8192
GROWS = 4  # from one size to the next; nobody needs more than that many times as much


def batch_of(tokens: int) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(
        hidden=torch.randn(tokens, HIDDEN, generator=rng),
        weight=torch.randn(VOCAB, HIDDEN, generator=rng).mul_(HIDDEN**-0.5),
        targets=torch.randint(VOCAB, (tokens,), generator=rng),
        cu_seqlens=torch.tensor([0, tokens]),
        advantages=torch.randn(tokens, generator=rng),
        old_logp=torch.full((tokens,), -9.0),
        kept=torch.ones(tokens, dtype=torch.bool),
    )


def _available() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def curve(sizes: Sequence[int], threads: int, skip: Sequence[str], seconds: float) -> Iterator[Row]:
    """A row for each contender and number of tokens."""
    for contender in without([c for c in contenders("train") if c.side != "floor" and not c.compiles], skip):
        last = 0
        for tokens in sizes:
            row: Row = {
                "op": "memory", "contender": contender.name, "side": contender.side, "tokens": tokens, "dtype": "fp32",
                "shape": f"{tokens}x{HIDDEN}x{VOCAB}", "head": f"{HIDDEN}x{VOCAB}",
            }  # fmt: skip
            if GROWS * last > 0.8 * _available():
                yield row | {"verdict": f"skipped: would need about {GROWS * last / 1e9:.0f} GB"}
                break
            try:
                last = alone.extra_bytes(partial(batch_of, tokens), "train", contender.name, threads, seconds=seconds)
            except RuntimeError as error:
                yield row | {"verdict": f"skipped: {error}"}
                break
            yield row | {"verdict": "ok", "extra_bytes": last}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser("memory", __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--skip", action="append", default=[], help="leave out contenders whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=120.0, help="longest for one number")
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args(argv)
    rows = []
    for row in curve(given.tokens, given.threads, given.skip, given.seconds):
        told = f"{row['extra_bytes'] / 1e6:.0f} MB" if "extra_bytes" in row else row["verdict"]
        print(f"{row['contender']}, {row['tokens']} tokens: {told}", flush=True)
        rows.append(row)
    environment.write(given.out, {"environment": environment.environment(given.threads), "rows": rows})
