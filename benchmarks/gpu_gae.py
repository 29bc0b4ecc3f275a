"""Times packed advantages on a GPU: mask, bootstrap, returns and whitening, by Triton, by CUDA and in plain torch.

    python benchmarks/gpu_gae.py --out gae.json        # on a GPU, under a minute
    python benchmarks/gpu_gae.py --sweep               # and other shapes of the Triton kernels' blocks
    python benchmarks/gpu_gae.py --device cpu          # tiny sizes; says what it could not run

``us`` is the device's time of one call inside a CUDA graph of many, median, least and most of the replays; ``host_us``
what the Python of one call costs. ``ulps`` is the largest distance from float64 over the rows, in float32 ulps of the
largest result. ``floor``: as many empty launches, and a copy of as many bytes as the rows must move.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, installed or not

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.backends import gae as torch_gae

GAMMA, LAM, EPS = 0.99, 0.95, 1e-8
CALLS, REPLAYS = 20, 50
Call = Callable[[], tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    rewards: Tensor
    values: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    bootstrap: Tensor


def draw(lengths: list[int], device: str) -> Batch:
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    mask = torch.rand(n, generator=g) >= 0.2
    rewards, values = torch.randn(2, n, generator=g)
    bootstrap, cu_seqlens = torch.randn(len(lengths), generator=g), torch.tensor([0, *lengths]).cumsum(0)
    return Batch(*(x.to(device) for x in (rewards.where(mask, 0.0), values, cu_seqlens, mask, bootstrap)))


def in_torch(b: Batch, whiten: bool = True) -> tuple[Tensor, Tensor]:
    advantages, returns = torch_gae.gae(*b, GAMMA, LAM)
    return (rk.whiten(advantages, b.mask, eps=EPS) if whiten else advantages), returns


def front_door(b: Batch) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"mask": b.mask, "bootstrap": b.bootstrap, "gamma": GAMMA, "lam": LAM}
    return rk.gae(b.rewards, b.values, b.cu_seqlens, whiten=True, checks=False, **options)


def contenders(b: Batch, cuda: bool, sweep: bool) -> dict[str, Call | str]:
    """Name -> what to call, or why it cannot be."""
    calls: dict[str, Call | str] = {"torch, whitened": lambda: in_torch(b), "front door": lambda: front_door(b)}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name in ("triton", "cuda"):
        try:
            module = importlib.import_module(f"rlhf_kernels.backends.{name}_gae")
        except ImportError as error:
            calls[name] = str(error)
            continue
        if not (cuda or (interpreted and name == "triton")):
            calls[name] = "no GPU"
            continue
        calls[f"{name}, whitened"] = lambda module=module: module.whitened_gae(*b, GAMMA, LAM, EPS)
        calls[f"{name}, plain"] = lambda module=module: module.gae(*b, GAMMA, LAM)
        if sweep and name == "triton":
            for shape in itertools.product((512, 1024, 2048), (4, 8), (256, 512, 1024)):
                calls["triton, {} rows, {} warps, {} programs".format(*shape)] = shaped(module, b, *shape)
    return calls


def shaped(module: Any, b: Batch, block: int, warps: int, programs: int) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        before, module.WARPS = module.WARPS, warps
        try:
            return module._launch(*b, GAMMA, LAM, EPS, block, programs)
        finally:
            module.WARPS = before

    return call


def floors(b: Batch) -> dict[str, Callable[[], Any]]:
    """Two empty launches; and a copy of what two passes must read and one must write, read and written half each."""
    small = torch.zeros(1, device=b.rewards.device)
    half = torch.empty(b.rewards.numel() * (2 * 9 + 8) // 2, dtype=torch.uint8, device=small.device)
    to = torch.empty_like(half)
    return {"floor: two launches": lambda: (small.zero_(), small.zero_()), "floor: bytes": lambda: to.copy_(half)}


def timed(call: Callable[[], Any], cuda: bool) -> dict[str, Any]:
    for _ in range(3):
        call()
    if not cuda:
        start = time.perf_counter()
        call()
        return {"us": 1e6 * (time.perf_counter() - start), "n": 1}
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    host = 1e6 * (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    spans = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(1e3 * begin.elapsed_time(end) / CALLS)
    cell = {"us": statistics.median(spans), "least": min(spans), "most": max(spans), "host_us": host, "n": REPLAYS}
    return {name: round(x, 2) for name, x in cell.items()}


def ulps(got: tuple[Tensor, Tensor], b: Batch, whiten: bool) -> float:
    """Of advantages and returns, against float64."""
    wide = Batch(*(x.double() if x.is_floating_point() else x for x in b))
    worst = 0.0
    for x, want in zip(got, in_torch(wide, whiten), strict=True):
        unit = torch.finfo(torch.float32).eps * want.abs().max()
        worst = max(worst, ((x.double() - want).abs().max() / unit).item())
    return round(worst, 2)


def measure(device: str, sweep: bool) -> list[dict[str, Any]]:
    cuda = device == "cuda"
    shapes = {"128 x 4096": [4096] * 128, "one of 1,000,000": [1_000_000], "100,000 of 1 to 19": [*range(1, 20)] * 5263}
    if not cuda:
        shapes = {"4 x 32": [32] * 4, "one of 100": [100]}
    cells = []
    for shape, lengths in shapes.items():
        b = draw(lengths, device)
        for name, call in contenders(b, cuda, sweep).items():
            cell: dict[str, Any] = {"shape": shape, "what": name}
            if isinstance(call, str):
                cells.append(cell | {"skipped": call})
                continue
            try:
                error = ulps(call(), b, "plain" not in name)
                assert error < 64, f"wrong: {error} ulps"
                cells.append(cell | timed(call, cuda) | {"ulps": error})
            except Exception as error:  # a compiler's or a launch's refusal is a finding
                cells.append(cell | {"error": f"{type(error).__name__}: {str(error)[:200]}"})
        cells += [{"shape": shape, "what": name} | timed(call, cuda) for name, call in floors(b).items()]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweep", action="store_true", help="other blocks, warps and programs of the Triton kernels")
    parser.add_argument("--out", type=Path, help="where the JSON goes; printed anyway")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    about = {"torch": torch.__version__, "python": platform.python_version(), "device": args.device}
    about["gpu"] = torch.cuda.get_device_name() if cuda else "none"
    report = json.dumps({"about": about, "cells": measure(args.device, args.sweep)}, indent=1)
    print(report)
    if args.out:
        args.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
