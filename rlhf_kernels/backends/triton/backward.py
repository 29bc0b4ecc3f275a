"""From gradients of logits to those of hidden states, weight and bias: the two large products of the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.backends.triton.gradient import gradients
from rlhf_kernels.backends.triton.operands import Norms, Rows
from rlhf_kernels.backends.triton.products import leave_product, product
from rlhf_kernels.backends.triton.table import Entry
from rlhf_kernels.types import Grads, Sinks, TokenStats

FLOAT16_ROOM = 2.0**14  # largest gradient after scaling: sums of products stay far below what float16 can hold


def from_exponentials(rows: Rows, e: Tensor, norms: Norms, stats: TokenStats, grads: Grads, sinks: Sinks) -> None:
    """Where only log p counts, no pass over the logits is left: dz = c (e - sum e [v = target]) with c = -g / sum e.

    One entry of each row is put right; the factor goes into hidden states for the one product and onto the rows of the
    other. Uses up ``e``.
    """
    total = norms[1].exp()
    at = (torch.arange(rows.count, device=e.device), rows.targets[:, 0].clamp(0, rows.vocab - 1))
    # p - 1 of near certainty keeps its digits; scatter_ would do, but waits where torch is told to be deterministic
    e.index_put_(at, (stats.logp[:, 0].expm1() * total).to(e.dtype))
    per_t = rows.per_t if rows.temperature is None else rows.temperature.reciprocal()
    factor = (-rows.policy.scale * grads.logp[:, 0] / total * per_t)[:, None]
    weight = rows.policy.weight
    assert weight is not None
    if sinks.hidden is not None:
        torch.mul(product(e, weight), factor, out=sinks.hidden)
    if sinks.weight is not None:
        leave_product(sinks.weight, e.T, (rows.policy.hidden.float() * factor).to(e.dtype), sinks.fresh)


def from_logits(
    rows: Rows, kept: Tensor, kept_ref: Tensor | None, norms: Norms, stats: TokenStats, grads: Grads, sinks: Sinks,
    here: Entry,
) -> None:  # fmt: skip
    """Any gradient of the statistics: one pass that puts dz where the logits were, then the products."""
    weight, hidden = rows.policy.weight, rows.policy.hidden
    if weight is None:
        if sinks.hidden is not None:
            gradients(rows, kept, None, sinks.hidden, stats, norms, grads, here.pieces)
            _leave_bias(sinks, sinks.hidden)
        elif sinks.bias is not None:
            out = torch.empty(kept.shape, dtype=torch.float32, device=kept.device)
            gradients(rows, kept, None, out, stats, norms, grads, here.pieces)
            _leave_bias(sinks, out)
        return
    gradients(rows, kept, kept_ref, kept, stats, norms, grads, here.pieces)
    _leave_bias(sinks, kept)
    if hidden.dtype == torch.float16:
        _products_of_float16(kept, hidden, weight, sinks, here.strip)
        return
    g = kept.to(hidden.dtype)
    if sinks.hidden is not None:
        sinks.hidden.copy_(product(g, weight))
    if sinks.weight is not None:
        leave_product(sinks.weight, g.T, hidden, sinks.fresh)


def _leave_bias(sinks: Sinks, g: Tensor) -> None:
    if sinks.bias is not None:
        found = g.sum(0, dtype=torch.float32)
        sinks.bias.copy_(found) if sinks.fresh else sinks.bias.add_(found)


def _products_of_float16(g: Tensor, hidden: Tensor, weight: Tensor, sinks: Sinks, strip: int) -> None:
    """A strip at a time, scaled into float16's range by a power of two that only the device knows."""
    most = torch.linalg.vector_norm(g, torch.inf) if g.numel() else g.new_zeros(())
    up = torch.exp2((FLOAT16_ROOM / most.clamp(min=1e-30)).log2().floor()).where(most > 0, 1.0)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for first in range(0, weight.shape[0], strip):
        part = (g[:, first : first + strip] * up).half()
        if sinks.hidden is not None:
            total += product(part, weight[first : first + strip])
        if sinks.weight is not None:
            found = product(part.T, hidden).div_(up)
            there = sinks.weight[first : first + strip]
            there.copy_(found) if sinks.fresh else there.add_(found)
    if sinks.hidden is not None:
        sinks.hidden.copy_(total / up)
