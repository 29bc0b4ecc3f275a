"""Times packed advantages: mask, bootstrap, returns and whitening, by Triton, by CUDA, in plain torch and by peers.

``us`` is the device's time of one call inside a CUDA graph of many, median, least and most of the replays; ``host_us``
what the Python of one call costs. ``floor``: as many empty launches, and a copy of as many bytes as the rows must move.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.contenders.base import Skipped
from benchmarks.contenders.gae import CONTENDERS
from benchmarks.gpu.context import Context
from benchmarks.work.replies import Replies
from rlhf_kernels.backends import gae as torch_gae

GAMMA, LAM, EPS = 0.99, 0.95, 1e-8
MOST_ULPS = 64
Call = Callable[[], Any]


class Batch(NamedTuple):
    rewards: Tensor
    values: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    bootstrap: Tensor


def shapes(ctx: Context) -> dict[str, list[int]]:
    if ctx.dry:
        return {"2 x 32": [32] * 2}
    return {"128 x 4096": [4096] * 128, "one of 1,000,000": [1_000_000], "100,000 of 1 to 19": [*range(1, 20)] * 5263}


def draw(lengths: list[int], place: str) -> Batch:
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    mask = torch.rand(n, generator=g) >= 0.2
    rewards, values = torch.randn(2, n, generator=g)
    bootstrap, cu_seqlens = torch.randn(len(lengths), generator=g), torch.tensor([0, *lengths]).cumsum(0)
    return Batch(*(x.to(place) for x in (rewards.where(mask, 0.0), values, cu_seqlens, mask, bootstrap)))


def in_torch(b: Batch, whiten: bool = True) -> tuple[Tensor, Tensor]:
    advantages, returns = torch_gae.gae(*b, GAMMA, LAM)
    return (rk.whiten(advantages, b.mask, eps=EPS) if whiten else advantages), returns


def front_door(b: Batch) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"mask": b.mask, "bootstrap": b.bootstrap, "gamma": GAMMA, "lam": LAM}
    return rk.gae(b.rewards, b.values, b.cu_seqlens, whiten=True, checks=False, **options)


def ours(ctx: Context, b: Batch, name: str) -> dict[str, Call]:
    """By one of our kernels, with whitening and without."""
    if name == "torch":
        return {"torch, whitened": partial(in_torch, b), "front door": partial(front_door, b)}
    if ctx.dry and name == "cuda":
        raise Skipped("a dry run has no GPU for the CUDA extension")
    module: Any = importlib.import_module(f"rlhf_kernels.backends.{name}_gae")
    return {
        f"{name}, whitened": lambda: module.whitened_gae(*b, GAMMA, LAM, EPS),
        f"{name}, plain": lambda: module.gae(*b, GAMMA, LAM),
    }


def rl_triton(lengths: list[int], place: str) -> Call:
    """Its advantages of as many replies of equal length. It knows no mask and no bootstrap, and makes nothing else.

    Raises:
        Skipped: The lengths differ.
    """
    if len(set(lengths)) > 1:
        raise Skipped("it takes no sequences of different lengths")
    peer = next(c for c in CONTENDERS if c.name.startswith("rl-triton"))
    return peer.build(Replies.draw(len(lengths), lengths[0], place))


def shaped(b: Batch, block: int, warps: int, programs: int) -> tuple[Tensor, Tensor]:
    """By Triton with blocks of another shape."""
    module: Any = importlib.import_module("rlhf_kernels.backends.triton_gae")
    before, module.WARPS = module.WARPS, warps
    try:
        return module._launch(*b, GAMMA, LAM, EPS, block, programs)
    finally:
        module.WARPS = before


def floors(b: Batch) -> dict[str, Call]:
    """Two empty launches; and a copy of what two passes must read and one must write, read and written half each."""
    small = torch.zeros(1, device=b.rewards.device)
    half = torch.empty(b.rewards.numel() * (2 * 9 + 8) // 2, dtype=torch.uint8, device=small.device)
    to = torch.empty_like(half)
    return {"floor: two launches": lambda: (small.zero_(), small.zero_()), "floor: bytes": lambda: to.copy_(half)}


def timed(ctx: Context, call: Call) -> dict[str, float]:
    calls, replays = (1, 2) if ctx.dry else (20, 30)
    for _ in range(0 if ctx.dry else 3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = 1e6 * (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    spans = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(1e3 * begin.elapsed_time(end) / calls)
    return {"us": statistics.median(spans), "least": min(spans), "most": max(spans), "host_us": host}


def ulps(got: tuple[Tensor, Tensor], b: Batch, whiten: bool) -> float:
    """The largest distance of advantages and returns from float64, in float32 ulps of the largest result."""
    wide = Batch(*(x.double() if x.is_floating_point() else x for x in b))
    worst = 0.0
    for x, want in zip(got, in_torch(wide, whiten), strict=True):
        unit = torch.finfo(torch.float32).eps * want.abs().max()
        worst = max(worst, ((x.double() - want).abs().max() / unit).item())
    return worst


def entered(ctx: Context, shape: str, calls: dict[str, Call], b: Batch) -> None:
    """A row each: how wrong, and then how long."""
    for name, call in calls.items():
        with ctx.attempt(f"{name}; {shape}"):
            error = ulps(call(), b, "plain" not in name)
            ctx.row(shape=shape, what=name, ulps=error, ok=error < MOST_ULPS, **timed(ctx, call))


def run(ctx: Context) -> None:
    batches = {name: draw(lengths, ctx.place) for name, lengths in shapes(ctx).items()}
    for shape, b in batches.items():
        for name in ("triton", "cuda", "torch"):
            with ctx.attempt(f"{name}; {shape}"):
                entered(ctx, shape, ours(ctx, b, name), b)
        for name, call in floors(b).items():
            with ctx.attempt(f"{name}; {shape}"):
                ctx.row(shape=shape, what=name, **timed(ctx, call))
        with ctx.attempt(f"rl-triton; {shape}"):
            ctx.row(shape=shape, what="rl-triton, plain", **timed(ctx, rl_triton(shapes(ctx)[shape], ctx.place)))
    # rows and warps of a program, and programs: those first that one wave of a large chip holds
    tried = [(32, 4, 2)] if ctx.dry else [
        (1024, 4, 512), (2048, 8, 256), (1024, 8, 256), (512, 4, 512), (1024, 4, 256), (512, 2, 512), (1024, 8, 512),
    ]  # fmt: skip
    for blocks in tried:
        for shape, b in batches.items():
            if ctx.left() > 3 or ctx.dry:
                name = "triton, {} rows, {} warps, {} programs".format(*blocks)
                entered(ctx, shape, {name: partial(shaped, b, *blocks)}, b)
