"""Times the head on a GPU beside its floor: bare products of the same shapes, in the same run.

    python benchmarks/gpu_head.py --out head.json      # about three minutes on an H200
    python benchmarks/gpu_head.py --device cpu         # tiny sizes: the same calls, for a machine without a GPU

Each row: median, least and most milliseconds of interleaved repeats by CUDA events, TFLOP/s, the share of the floor,
peak extra memory, and the largest error of logp and entropy against float64 on a sample of rows. Logits are peaked
(mean entropy about 0.6 nats), nothing is masked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, installed or not

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.kernel_hash import hashes
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import table

SHAPES = {"Qwen2.5-0.5B": (8192, 896, 151936), "Qwen3-1.7B": (8192, 2048, 151936), "Qwen3-8B": (8192, 4096, 151936)}
TINY = {"tiny": (48, 32, 300)}
SAMPLE = 256  # rows whose float64 truth is computed
Step = Callable[[], Any]


def draw(shape: tuple[int, int, int], device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden states, weight and targets: standard deviation 2.5, one token that stands out by 15 to 35."""
    n, h, v = shape
    rng = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(v, h, generator=rng, device=device).mul_(h**-0.5)
    tops = torch.randint(v, (n,), generator=rng, device=device)
    lift = 15 + 20 * torch.rand(n, 1, generator=rng, device=device)
    hidden = 2.5 * torch.randn(n, h, generator=rng, device=device) + lift * weight[tops]
    targets = torch.where(torch.rand(n, generator=rng, device=device) < 0.9, tops, tops.flip(0))
    return hidden.bfloat16(), weight.bfloat16(), targets


@contextlib.contextmanager
def way(name: str, device: str) -> Iterator[None]:
    """The table's entry of this device, with one of the two ways through the head."""
    listed, before = table.entry(torch.device(device)), backend.entry
    chosen = listed.by(name)
    backend.entry = lambda device: chosen
    try:
        yield
    finally:
        backend.entry = before


def products(hidden: Tensor, weight: Tensor) -> dict[str, Step]:
    """The floor: one and three bare products, the first with either output."""
    rows = min(len(hidden), 4096)  # as much of the logits as exists at a time
    x, g = hidden[:rows], torch.randn(rows, len(weight), device=hidden.device).to(hidden.dtype)
    z, full = torch.empty_like(g), torch.zeros(weight.shape, device=hidden.device)
    repeats = -(-len(hidden) // rows)

    def one() -> None:
        for _ in range(repeats):
            torch.mm(x, weight.T, out=z)

    def one_full() -> None:
        for _ in range(repeats):
            backend.product(x, weight.T)

    def three() -> None:
        for _ in range(repeats):
            torch.mm(x, weight.T, out=z)
            torch.mm(g, weight)
            torch.mm(g.T, x)

    def three_full() -> None:
        from rlhf_kernels.backends.triton.products import leave_product

        for _ in range(repeats):
            backend.product(x, weight.T)
            backend.product(g, weight)
            leave_product(full, g.T, x, False)

    return {"1 mm": one, "1 mm, fp32 out": one_full, "3 mm": three, "3 mm, fp32 out": three_full}


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, name: str) -> dict[str, Step]:
    """Scoring and PPO, one way through the head."""
    n = len(targets)
    backend_name = "triton" if hidden.is_cuda or backend.INTERPRETED else "eager"
    head: Any = {"backend": backend_name, "checks": False}
    with torch.no_grad():
        old = rk.token_stats(hidden, weight, targets, **head).logp
    advantages = torch.randn(n, device=hidden.device)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    full = torch.zeros(weight.shape, device=hidden.device)

    def score() -> Any:
        with torch.no_grad(), way(name, hidden.device.type):
            return rk.token_stats(hidden, weight, targets, **head)

    def ppo() -> None:
        x.grad = w.grad = None
        with way(name, hidden.device.type):
            rk.ppo_loss(x, w, targets, old, advantages, weight_grad=full, **head).loss.backward()

    return {f"score, {name}": score, f"ppo, {name}": ppo}


def once(step: Step, cuda: bool) -> float:
    """Milliseconds."""
    if not cuda:
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak(step: Step, cuda: bool) -> float:
    """Megabytes beyond what there was before."""
    if not cuda:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def errors(stats: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    """Against float64 on a sample of rows, and what a product with float32 output alone is off by."""
    some = torch.arange(0, len(targets), max(1, len(targets) // SAMPLE), device=hidden.device)[:SAMPLE]
    z = hidden[some].double() @ weight.double().T
    logp = z.log_softmax(-1)
    at = targets[some, None]
    true, entropy = logp.gather(1, at).squeeze(1), -(logp.exp() * logp).sum(-1)
    plain = backend.product(hidden[some], weight.T).log_softmax(-1)
    found = {
        "logp": (stats.logp[some].double() - true).abs().max(),
        "entropy": (stats.entropy[some].double() - entropy).abs().max(),
        "logp of torch on a float32 product": (plain.gather(1, at).squeeze(1).double() - true).abs().max(),
        "entropy of torch on a float32 product": (-(plain.exp() * plain).sum(-1).double() - entropy).abs().max(),
        "mean entropy in nats": entropy.mean(),
    }
    return {name: float(x) for name, x in found.items()}


def measure(name: str, shape: tuple[int, int, int], device: str, repeats: int) -> list[dict[str, Any]]:
    """All rows of a shape, its steps in turns."""
    cuda, (n, h, v) = device == "cuda", shape
    hidden, weight, targets = draw(shape, device)
    steps = products(hidden, weight)
    for each in ("fused", "strips"):
        steps |= ours(hidden, weight, targets, each)
    memory = {key: peak(step, cuda) for key, step in steps.items()}  # and the first call, which compiles
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(repeats):
        for key, step in steps.items():
            times[key].append(once(step, cuda))
    rows = []
    for key, ms in times.items():
        gemms = 1 if key.startswith(("1", "score")) else 3
        floor = statistics.median(times[f"{gemms} mm"])
        row = {
            "model": name, "shape": list(shape), "what": key, "ms": statistics.median(ms), "least": min(ms),
            "most": max(ms), "tflops": gemms * 2 * n * h * v / statistics.median(ms) / 1e9,
            "over_floor": statistics.median(ms) / floor, "extra_mb": memory[key],
        }  # fmt: skip
        if key.startswith("score"):
            row["errors"] = errors(steps[key](), hidden, weight, targets)
        rows.append(row)
        print(f"{name:14}{key:20}{row['ms']:9.2f} ms{row['tflops']:8.0f} TFLOP/s{row['over_floor']:7.2f}x", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu runs the same calls at tiny sizes")
    rows = []
    for name, shape in (SHAPES if args.device == "cuda" else TINY).items():
        rows += measure(name, shape, args.device, args.repeats)
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "sources": hashes(), "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
