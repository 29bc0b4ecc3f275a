"""What this chip gives at best: bytes copied, and bare products, those of a language model's head first of all."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.stages import clock
from benchmarks.gpu.stages.shapes import heads
from rlhf_kernels.backends.triton.products import leave_product, product

REPEATS = 5


def measure(ctx: Context, step: clock.Step, flop: float = 0, moved: float = 0, **cells: Any) -> None:
    """The median of a few calls after one that does not count."""
    step()
    times = [clock.once(step) for _ in range(1 if ctx.dry else REPEATS)]
    ms = statistics.median(times)
    rates = {"tflops": flop / ms / 1e9} if flop else {"gb_per_s": moved / ms / 1e6}
    ctx.row(**cells, ms=ms, least=min(times), **rates)


def copied(ctx: Context) -> None:
    """Bytes read and written."""
    source = torch.ones(1 << (12 if ctx.dry else 31), dtype=torch.int8, device=ctx.place)
    to = torch.empty_like(source)
    measure(ctx, lambda: to.copy_(source), moved=2 * source.numel(), op="copy")


def rows_of_logits(ctx: Context, rows: int, h: int, v: int) -> None:
    """The three products of a head on some rows, with halves and with float32 coming out."""
    new = partial(torch.randn, device=ctx.place, dtype=torch.bfloat16)
    hidden, weight, e = new(rows, h), new(v, h), new(rows, v)
    what = {"rows": rows, "H": h, "V": v, "flop": 2 * rows * h * v}
    logits, full = torch.empty_like(e), torch.empty(rows, v, device=ctx.place)
    measure(ctx, lambda: torch.mm(hidden, weight.T, out=logits), **what, op="logits", out="bf16")
    measure(ctx, lambda: product(hidden, weight.T, out=full), **what, op="logits", out="fp32")
    measure(ctx, lambda: torch.mm(e, weight), **what, op="dX", out="bf16")
    measure(ctx, lambda: product(e, weight), **what, op="dX", out="fp32")
    measure(ctx, lambda: torch.mm(e.T, hidden), **what, op="dW", out="bf16")
    total = torch.zeros(v, h, device=ctx.place)
    measure(ctx, lambda: leave_product(total, e.T, hidden, True), **what, op="dW", out="fp32")
    measure(ctx, lambda: leave_product(total, e.T, hidden, False), **what, op="dW, beta = 1", out="fp32")


def strips(ctx: Context, rows: int, h: int, width: int) -> None:
    """Logits in float32, a strip of columns at a time: what a pass over them finds in the L2, or does not."""
    hidden, weight = (torch.randn(n, h, device=ctx.place, dtype=torch.bfloat16) for n in (rows, width))
    out = torch.empty(rows, width, device=ctx.place)
    what = {"rows": rows, "H": h, "V": width, "flop": 2 * rows * h * width}
    measure(ctx, lambda: product(hidden, weight.T, out=out), **what, op="strip of logits", out="fp32")


def run(ctx: Context) -> None:
    size = 64 if ctx.dry else 8192
    with ctx.attempt("copy"):
        copied(ctx)
    with ctx.attempt("square product"):
        a, b = torch.randn(2, size, size, device=ctx.place).bfloat16()
        measure(ctx, lambda: torch.mm(a, b), flop=2 * size**3, op=f"{size}^3", out="bf16")
    for n, h, v in heads(ctx):
        for rows in (n, n // 2, n // 4):
            if ctx.left() > 1:
                with ctx.attempt(f"products of {rows} x {h} x {v}"):
                    rows_of_logits(ctx, rows, h, v)
        for width in (v // 4, v // 2, v) if ctx.dry else (4096, 8192, 16384):
            for rows in (n, n // 2, n // 4):
                with ctx.attempt(f"a strip of {rows} x {h} x {width}"):
                    strips(ctx, rows, h, width)
