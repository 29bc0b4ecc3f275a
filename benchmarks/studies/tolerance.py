"""What `tolerance=` is worth: time, what was lost, and the error of the gradients, beside the exact way and the peers.

    python -m benchmarks tolerance --shape small --dtype fp32 --out FILE     # a minute; the large shape takes ten
    python -m benchmarks tolerance --shape qwen3-8b --tokens 8192 --dtype bf16 --device cuda --kept

The batch is RL-like: half of it prompt, 30 % of the rest without advantage. Everybody runs in one process and in turns;
ratios are paired by round. Peers are given the whole batch or, `--kept`, the rows that count only. Errors are relative
(L2) and against float64. `plain torch in bf16` is the pipeline whose error a tolerance may have: logits in bfloat16.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from benchmarks import command
from benchmarks.contenders.base import Skipped
from benchmarks.contenders.roster import contenders
from benchmarks.measure.turns import in_turns
from benchmarks.report.environment import environment, write
from benchmarks.report.kernel_hash import hashes
from benchmarks.report.tables import grid
from benchmarks.work.cases import DTYPES, MODELS, SHAPES, Batch, draw, for_op, shape_of
from benchmarks.work.objectives import LOSSES

TOLERANCES = (None, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
Gradients = tuple[Tensor, Tensor]


def ours(batch: Batch, tolerance: float | None, backend: str = "auto") -> tuple[Gradients, dict[str, Tensor]]:
    """Gradients of hidden states and weight, and the metrics."""
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    targets = batch.targets.masked_fill(~batch.kept, -100)
    out = rk.ppo_loss(hidden, weight, targets, batch.old_logp, batch.advantages, tolerance=tolerance, backend=backend)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    return (grads[0], grads[1]), out.metrics


def plain(batch: Batch, dtype: torch.dtype) -> Gradients:
    """Logits in this dtype, as ``F.linear`` leaves them, then float32."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (batch.hidden, batch.weight))
    rows = batch.kept.nonzero().squeeze(1)
    logp = torch.cat([
        F.linear(hidden[some], weight).float().log_softmax(-1).gather(1, batch.targets[some, None]).squeeze(1)
        for some in rows.split(64)
    ])  # fmt: skip
    whole = torch.zeros(len(batch.targets), device=logp.device).index_copy(0, rows, logp)
    grads = torch.autograd.grad(LOSSES["sparse"](whole, None, batch), (hidden, weight))
    return grads[0], grads[1]


def errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Relative errors (L2) of the two gradients."""
    pairs = zip(("grad_hidden", "grad_weight"), found, exact, strict=True)
    return {name: float((x.double() - y.double()).norm() / y.double().norm()) for name, x, y in pairs}


def accuracy(batch: Batch) -> list[dict[str, Any]]:
    """Errors of every tolerance, and of plain torch in bfloat16."""
    double = replace(batch, hidden=batch.hidden.double(), weight=batch.weight.double())
    exact, _ = ours(double, None, "eager")
    rows = []
    for tolerance in TOLERANCES:
        grads, metrics = ours(batch, tolerance)
        said = {
            name.removeprefix("tolerance/"): float(x) for name, x in metrics.items() if name.startswith("tolerance")
        }
        rows.append(
            {"name": "exact" if tolerance is None else f"tolerance={tolerance:g}"} | errors(grads, exact) | said
        )
    return [*rows, {"name": "plain torch in bf16"} | errors(plain(batch, torch.bfloat16), exact)]


def times(batch: Batch, op: str, rounds: int, peers: bool) -> dict[str, list[float]]:
    """Seconds of each, one list entry a round."""
    steps: dict[str, Callable[[], Any]] = {
        "exact" if t is None else f"tolerance={t:g}": lambda t=t: ours(batch, t) for t in TOLERANCES
    }
    for contender in contenders(op) if peers else ():
        if contender.side != "peer":
            continue
        try:
            steps[contender.name] = contender.build(batch)
            steps[contender.name]()
        except (ImportError, Skipped) as error:
            print(f"{contender.name}: skipped, {error}", flush=True)
            steps.pop(contender.name, None)
    found = in_turns(steps, rounds=rounds + 1, cuda=batch.hidden.is_cuda, slow=math.inf)
    return {name: [total for total, _ in times[1:]] for name, times in found.items()}  # The first round warms up.


def table(result: dict[str, Any]) -> str:
    exact, known = result["seconds"]["exact"], {row["name"]: row for row in result["accuracy"]}
    lines = []
    for name in [*result["seconds"], "plain torch in bf16"]:
        seconds, row = result["seconds"].get(name), known.get(name, {})
        ratio = seconds and statistics.median(a / b for a, b in zip(exact, seconds, strict=True))
        cells = [
            f"{statistics.median(seconds) * 1e3:.0f}" if seconds else "",
            f"{ratio:.2f}" if ratio else "",
            f"{row['lost']:.1e}" if "lost" in row else "",
            f"{row['dense']:.0%}" if "dense" in row else "",
            *(f"{row[k]:.1e}" if k in row else "" for k in ("grad_hidden", "grad_weight")),
        ]
        lines.append((name, *cells))
    return grid(("", "ms", "exact / it", "lost", "rows kept whole", "error of grad_hidden", "of grad_weight"), lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.parser("tolerance", __doc__)
    parser.add_argument("--shape", choices=[*SHAPES, *MODELS], default="small")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--nats", type=float, default=0.5, help="mean entropy of the rows, inf for uniform ones")
    parser.add_argument("--all-rows", action="store_true", help="no prompts, and every row with a gradient")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kept", action="store_true", help="give peers the rows that count only")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = shape_of(args.shape, args.tokens)
    batch, truth = draw(shape, DTYPES[args.dtype], nats=args.nats, device=args.device)
    op = "train" if args.all_rows else "sparse_kept" if args.kept else "sparse"
    batch, _ = for_op(op, batch, truth)
    result = {
        "environment": environment(args.threads, device=args.device),
        "sources": hashes(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "shape": str(shape),
        "dtype": args.dtype,
        "nats": args.nats,
        "op": op,
        "seconds": times(batch, op, args.rounds, not args.no_peers),
        "accuracy": accuracy(batch),
    }
    print(table(result))
    write(args.out, result)
