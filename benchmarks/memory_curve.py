"""Peak memory of a loss against the number of tokens, up to a million: forward and backward, in a process each.

    python -m benchmarks.memory_curve --out curve.json

What a contender would need beyond this machine's memory is not run: the row says so and has no number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import memory, report
from benchmarks.cases import Batch
from benchmarks.contenders import contenders, without
from benchmarks.measure import Row, brief

TOKENS = (1024, 4096, 16384, 65536, 262144, 1048576)
HIDDEN, VOCAB = 32, 8192
GROWS = 4  # from one size to the next; nobody needs more than that many times as much


def _batch(tokens: int) -> Batch:
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


def _extra_bytes(tokens: int, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    contender = next(c for c in contenders("train") if c.name == name)
    contender.build(_batch(64))()
    step = contender.build(_batch(tokens))
    memory.forget_the_past()
    before = memory._kilobytes("VmRSS")
    result = step()
    gradients = [g for g in (result.grad_hidden, result.grad_weight) if g is not None]
    return (memory._kilobytes("VmHWM") - before) * 1024 - sum(g.numel() * g.element_size() for g in gradients)


def _available() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def curve(sizes: Sequence[int], threads: int, skip: Sequence[str], seconds: float) -> Iterator[Row]:
    """A row for each contender and number of tokens."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([memory.__name__, __name__, *memory.SEVERAL_SECONDS_TO_IMPORT])
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
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                asked = pool.submit(_extra_bytes, tokens, contender.name, threads)
                try:
                    last = asked.result(seconds)
                except Exception as error:
                    for process in (pool._processes or {}).values():
                        process.kill()  # ours, and perhaps still busy
                    yield row | {"verdict": f"skipped: {brief(error)}"}
                    break
            yield row | {"verdict": "ok", "extra_bytes": last}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    if given.out:
        environment = report.environment(given.threads, None)
        given.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
