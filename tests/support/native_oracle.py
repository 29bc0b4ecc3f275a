"""Tiles for ``test_native``, and what plain torch says about them: logits materialized, gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.types import Grads, Head, Sinks, Tile


def draw(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * scale).to(dtype)


def make_tile(
    n: int, size: int, vocab: int, dtype: torch.dtype, k: int = 1, spread: float = 3.0, **options: Any
) -> Tile:
    """Random rows whose products have the standard deviation ``spread``."""
    hidden = draw(n, size, seed=1, dtype=dtype)
    weight = options.pop("weight", draw(vocab, size, seed=2, scale=spread / size**0.5, dtype=dtype))
    targets = torch.randint(vocab, (n, k), generator=torch.Generator().manual_seed(3))
    temperature, reference = options.pop("temperature", 1.0), options.pop("reference", None)
    return Tile(hidden, Head(weight, **options), targets, temperature, reference)


def full(tile: Tile) -> torch.dtype:
    return torch.float64 if tile.hidden.dtype == torch.float64 else torch.float32


def make_grads(tile: Tile) -> Grads:
    """Something for every statistic."""
    n, k = tile.targets.shape
    sizes = [(n, k), (n,), (n,), (n,), (n,)]
    grads = [draw(*size, seed=7 + i, scale=1 / max(n, 1), dtype=full(tile)) for i, size in enumerate(sizes)]
    if tile.reference is None:
        grads[4].zero_()
    return Grads(*grads)


def make_sinks(tile: Tile, rows: int | None = None) -> Sinks:
    n, size = tile.hidden.shape
    dtype = full(tile) if tile.hidden.dtype == torch.float16 else tile.hidden.dtype
    hidden = torch.full((n if rows is None else rows, size), torch.nan, dtype=dtype)
    weight = None if tile.head.weight is None else torch.zeros(tile.head.weight.shape, dtype=full(tile))
    return Sinks(hidden, weight, None if tile.head.bias is None else torch.zeros_like(tile.head.bias, dtype=full(tile)))


def _logits(hidden: Tensor, head: Head, weight: Tensor, bias: Tensor | None, temperature: float | Tensor) -> Tensor:
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z if z.dtype == torch.float64 else z.float()
    return z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)


def plain(tile: Tile, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The leaves (hidden, weight and bias if there is one) and the statistics, computed in ``dtype``."""
    head, ref = tile.head, tile.reference
    assert head.weight is not None
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (tile.hidden, head.weight, head.bias) if x is not None]
    z = _logits(leaves[0], head, leaves[1], leaves[2] if len(leaves) == 3 else None, tile.temperature)
    log_p = torch.log_softmax(z, 1)
    stats = {
        "logp": log_p.gather(1, tile.targets),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "lse": torch.logsumexp(z, 1),
        "mean_logit": z.mean(1),
    }
    if ref is not None:
        assert ref.head.weight is not None
        bias = None if ref.head.bias is None else ref.head.bias.to(dtype)
        z_ref = _logits(ref.hidden.to(dtype), ref.head, ref.head.weight.to(dtype), bias, tile.temperature)
        a, b = log_p, torch.log_softmax(z_ref, 1)
        a, b = (b, a) if ref.direction == "forward" else (a, b)
        stats["kl"] = (a.exp() * (a - b)).sum(1)
    return leaves, stats


def plain_gradients(tile: Tile, grads: Grads, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of hidden, weight and bias, for these gradients of the statistics."""
    leaves, stats = plain(tile, dtype)
    upstream = [getattr(grads, name).to(x.dtype) for name, x in stats.items()]
    return dict(zip(Sinks._fields, torch.autograd.grad(list(stats.values()), leaves, upstream), strict=False))


def plain_gae(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """In float64, kept tokens first gathered, then the textbook loop."""
    advantages, returns = torch.zeros(2, rewards.numel(), dtype=torch.float64)
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    for s in range(ends.numel() - 1):
        tokens = [t for t in range(int(ends[s]), int(ends[s + 1])) if kept[t]]
        value, advantage = 0.0 if bootstrap is None else float(bootstrap[s]), 0.0
        for t in reversed(tokens):
            advantage = float(rewards[t]) + gamma * value - float(values[t]) + gamma * lam * advantage
            value = float(values[t])
            advantages[t], returns[t] = advantage, advantage + value
    return advantages, returns
