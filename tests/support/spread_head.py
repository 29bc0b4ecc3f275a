"""What the ranks of a spread head compute, and what one process computes on the whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf_kernels as rk

N, H, V = 23, 16, 101  # 101 columns on 2 or 3 ranks: the last part is shorter
CU = torch.tensor([0, 4, 9, 9, 23])  # ragged, one sequence without tokens


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    found = {
        "hidden": torch.randn(N, H, generator=rng, dtype=torch.float64),
        "weight": torch.randn(V, H, generator=rng, dtype=torch.float64),
        "bias": torch.randn(V, generator=rng, dtype=torch.float64),
        "advantages": torch.randn(N, generator=rng, dtype=torch.float64),
        "old_logp": -4 - torch.rand(N, generator=rng, dtype=torch.float64),
    }
    head = {name: found.pop(name).to(dtype) for name in ("hidden", "weight", "bias")}
    full = torch.float64 if dtype == torch.float64 else torch.float32
    found = head | {name: x.to(full) for name, x in found.items()}
    targets = torch.randint(V, (N,), generator=rng)
    targets[[0, 4, 5]] = -100
    return found | {"targets": targets}


def _ppo(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
    given = b["targets"], b["old_logp"], b["advantages"]
    return rk.ppo_loss(b["hidden"], weight, *given, entropy_coef=0.05, **head)


def _grpo(**options: Any) -> Callable[..., Any]:
    def run(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
        given = b["targets"], b["old_logp"], b["advantages"]
        return rk.grpo_loss(b["hidden"], weight, *given, cu_seqlens=CU, **options, **head)

    return run


def _dpo(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
    return rk.dpo_loss(b["hidden"], weight, b["targets"], CU, b["old_logp"], **head)


def _sft(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
    return rk.sft_loss(b["hidden"], weight, b["targets"], label_smoothing=0.1, z_loss=0.01, **head)


def _stats(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
    s = rk.token_stats(b["hidden"], weight, b["targets"], **head)
    a = b["advantages"]
    value = (a * s.logp + a.roll(1) * s.entropy + a.roll(2) * s.lse + a.roll(3) * s.mean_logit).mean()
    return rk.LossOutput(value, {k: getattr(s, k).detach() for k in ("logp", "entropy", "lse", "mean_logit")})


def _some_ids(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
    ids = torch.stack([b["targets"], (b["targets"] * 7 + 3).clamp(min=0) % V], 1)
    logps = rk.token_logps(b["hidden"], weight, ids, **head)
    return rk.LossOutput((logps * b["advantages"][:, None]).mean(), {"logps": logps.detach()})


def _ready(b: dict[str, Tensor], weight: Tensor, **head: Any) -> Any:
    logits = b["hidden"] @ weight.T
    s = rk.token_stats_from_logits(logits, b["targets"], **head)
    return rk.LossOutput((b["advantages"] * (s.logp + s.entropy)).mean(), {"logp": s.logp.detach()})


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ppo": (_ppo, {}),
    "ppo, bias and softcap": (_ppo, {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}),
    # by its own columns, the last of 3, and of 2 ranks would take one row more at once
    "ppo, in pieces": (_ppo, {"max_bytes": 4 * 4 * (34 + 6 * 2048) - 1}),
    "grpo": (_grpo(), {}),
    "grpo, per sequence": (_grpo(ratio="sequence"), {}),
    "dpo": (_dpo, {}),
    "sft": (_sft, {}),
    "statistics": (_stats, {}),
    "statistics, in pieces": (_stats, {"max_bytes": 4 * 4 * (51 + 6 * 2048) - 1}),
    "several ids": (_some_ids, {}),
    "ready logits": (_ready, {}),
    "nothing but prompt": (_ppo, {"nothing": True}),
}


def compute(name: str, dtype: torch.dtype, backend: str, ranks: int = 1, rank: int = 0) -> dict[str, Tensor]:
    """Loss, metrics and gradients of a case; on several ranks this one's rows of the head."""
    run, given = CASES[name]
    b, options = batch(dtype), dict(given)
    if options.pop("nothing", False):
        b["targets"].fill_(-100)
    stride = -(-V // ranks)
    mine = slice(rank * stride, min(V, (rank + 1) * stride))
    weight = b["weight"][mine].clone().requires_grad_()
    bias = b["bias"][mine].clone().requires_grad_() if options.pop("bias", False) else None
    hidden = b["hidden"].requires_grad_()
    spread = {} if ranks == 1 else {"tp_group": dist.group.WORLD, "vocab_size": V}
    out = run(b, weight, backend=backend, bias=bias, **options, **spread)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "hidden": hidden.grad, "weight": weight.grad}
    if bias is not None:
        found["bias"] = bias.grad
    return found | {f"metric {k}": x for k, x in out.metrics.items()}


def every_case(rank: int, ranks: int, backends: list[str]) -> dict[tuple[str, torch.dtype, str], dict[str, Tensor]]:
    """What this rank finds, by name, dtype and backend."""
    kinds = [(n, d, b) for n in CASES for d in (torch.float32, torch.float64, torch.bfloat16) for b in backends]
    return {kind: compute(*kind, ranks, rank) for kind in kinds}
