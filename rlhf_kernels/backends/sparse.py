"""Gradients of logits through the few entries that carry nearly all of them, in plain torch.

A row may lose entries as long as what it loses has at most ``tolerance`` times the norm (L2) of the row's whole
gradient. That is checked on the gradient itself, not estimated. Rows that would keep too many are left to the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.types import Entries, Sinks, Tile

ROWS = 64  # whose gradients are looked at together
STRIP = 2048  # columns that are multiplied together
SAFE = 1 - 1e-5  # sums of squares are rounded


class Kept(NamedTuple):
    columns: Tensor  # [s, C] int64
    values: Tensor  # [s, C]
    counts: Tensor  # [s] how many of the C are there


def most(vocab: int) -> int:
    """Entries of a row: with more of them the products with everything are nearly as fast."""
    return min(vocab // 2, max(64, vocab // 8))


def promising(rows: Tensor, entropy: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Rows to look at, and those whose mass is spread over more columns than a row may keep."""
    flat = entropy[rows] > math.log(most(vocab))
    return rows[~flat], rows[flat]


def select(rows: Tensor, vocab: int, gradient: Callable[[Tensor], Tensor], tolerance: float) -> Entries:
    """The largest entries of each row.

    Args:
        rows: [r] the rows to look at.
        vocab: V.
        gradient: [c] rows -> [c, V] gradient of their logits.
        tolerance: largest norm of what a row loses, relative to the row's.
    """
    if not rows.numel():
        none = torch.zeros(0, dtype=torch.float64, device=rows.device)
        return Entries(rows, rows, none, none, None)
    found = [_largest(gradient(part), most(vocab), tolerance) for part in rows.split(ROWS)]
    columns, values, counts, lost, norm = (torch.cat(x) for x in zip(*found, strict=True))
    few = counts >= 0
    return Entries(rows[few], rows[~few], lost, norm, Kept(columns[few], values[few], counts[few]))


def _largest(g: Tensor, few: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = g.abs().topk(few, dim=1).indices
    values = g.gather(1, columns)
    norm = g.double().square().sum(1)
    lost = (norm[:, None] - values.double().square().cumsum(1)).clamp_(min=0.0)
    enough = lost <= tolerance**2 * SAFE * norm[:, None]
    fine = enough[:, -1] & norm.isfinite() & (norm > 0)
    last = enough.int().argmax(1)
    counts = torch.where(fine, last + 1, -1)
    left_out = lost.gather(1, last[:, None]).squeeze(1).where(fine, 0.0)
    return columns, values, counts, left_out, norm


def multiply(tile: Tile, entries: Entries, sinks: Sinks) -> None:
    """The products with weight and hidden states, of columns that have an entry at all."""
    hidden, weight = tile.hidden[entries.rows], tile.head.weight
    assert weight is not None
    kept: Kept = entries.kept
    there = torch.arange(kept.columns.shape[1], device=hidden.device) < kept.counts[:, None]
    row, values = there.nonzero()[:, 0], kept.values[there]
    used, column = kept.columns[there].unique(return_inverse=True)
    wide = values.dtype
    grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    for sink in (sinks.weight, sinks.bias):
        if sink is not None and sinks.fresh:
            sink.zero_()
    for a in range(0, used.numel(), STRIP):
        here = (column >= a) & (column < a + STRIP)
        at = used[a : a + STRIP]
        g = values.new_zeros(hidden.shape[0], at.numel())
        g[row[here], column[here] - a] = values[here]
        grad_hidden += g @ weight[at].to(wide)
        if sinks.weight is not None:
            sinks.weight[at] = (sinks.weight[at] + g.T @ hidden.to(wide)).to(sinks.weight.dtype)
        if sinks.bias is not None:
            sinks.bias[at] += g.sum(0)
    if sinks.hidden is not None:
        sinks.hidden.copy_(grad_hidden)
