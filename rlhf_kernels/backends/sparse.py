"""Gradients of logits through the few entries that carry nearly all of them, in plain torch.

Every row may lose the same: a norm (L2) of ``tolerance`` times the root mean square, over the rows, of what is known of
their norms beforehand, the entries of their targets. So all rows together lose at most ``tolerance`` times the norm of
all, and rows that hardly matter, most of them in a model that is sure of itself, hardly keep an entry. What a row loses
is checked on the gradient itself, not estimated. Rows that would keep too many are left to the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.types import Entries, Grads, Sinks, Tile, TokenStats

ROWS = 8  # whose gradients are looked at together
STRIP = 2048  # columns that are multiplied together
SAFE = 1 - 1e-3  # sums of squares are rounded
ROUNDED = 2e-6  # what statistics of float32 leave uncertain of a row's entries, relative to all of them
TINY = 1e-28  # where float32 has lost the squares of what is left out
UNSURE = 2.0**-22  # of a probability that was rounded to one


class Kept(NamedTuple):
    columns: Tensor  # [s, C] int64
    values: Tensor  # [s, C]
    counts: Tensor  # [s] how many of the C are there


def most(vocab: int) -> int:
    """Entries of a row: with more of them the products with everything are nearly as fast."""
    return min(vocab // 2, max(64, vocab // 8))


def entries_bytes(few: int) -> int:
    """Bytes per row of ``Kept``, twice: while rows are picked, and while entries are."""
    return 2 * few * (8 + 8)


class Share(NamedTuple):
    """What every row may lose, and which rows are worth a look for it."""

    look: Tensor  # [r] int64 rows to look at
    flat: Tensor  # these look as if they had to keep too many
    lost: Tensor  # [a - r] float64 at least the squared norm of what the other rows lose: everything, or nothing
    norm: Tensor  # [a - r] float64 at most the squared norm of the same rows
    allowed: Tensor  # [] float64 squared norm that a row may lose
    floor: Tensor  # [r] float32 entries of a row below it have no larger norm together


def share(
    tile: Tile, stats: TokenStats, grads: Grads, rows: Tensor | None, columns: int, log_q: Tensor | None,
    tolerance: float, few: int,
) -> Share:  # fmt: skip
    """From statistics alone, before any entry is looked at.

    Args:
        tile: Its head has ``columns`` columns.
        stats: Of its rows.
        grads: Of those.
        rows: [a] rows that have a gradient; None is all.
        columns: V.
        log_q: [n, K] the reference's log-probabilities of the targets, where ``grads.kl`` is given.
        tolerance: see above.
        few: entries that a row may keep.
    """
    rows = torch.arange(stats.logp.shape[0], device=stats.logp.device) if rows is None else rows
    most = _absolute_sum(tile, stats, grads)[rows]
    seen = (_at_targets(tile, stats, grads, columns, log_q)[rows] - ROUNDED * most).clamp(min=0.0)
    allowed = tolerance**2 * SAFE * seen.square().mean()
    allowed = allowed.where(allowed.isfinite(), 0.0)  # beside an infinite gradient, or a NaN, all of them stay
    quiet = most.square() <= allowed
    flat = looks_flat(stats.entropy[rows], most / allowed.sqrt(), few) | (allowed <= TINY)
    look = ~(quiet | flat)
    lost = most.square().masked_fill(flat, 0.0)[~look]
    return Share(rows[look], rows[flat], lost, seen[~look].square(), allowed, (allowed / most[look]).float())


def looks_flat(entropy: Tensor, depth: Tensor, few: int) -> Tensor:
    """From how many columns have mass and how far below it one must go, whether a row will have to keep too many.

    A guess, which only costs time: on real logits it is right about four in five of those rows and wrong about one in
    ten of the others.
    """
    return entropy + 0.5 * depth.clamp(min=1.0).log() > math.log(max(1, few)) + 1


def _per_t(tile: Tile) -> float | Tensor:
    """[n, 1] or a number: d logit / d product, but for the softcap."""
    t = tile.temperature
    return tile.head.logit_scale / (t.double()[:, None] if isinstance(t, Tensor) else t)


def _at_targets(tile: Tile, stats: TokenStats, grads: Grads, columns: int, log_q: Tensor | None) -> Tensor:
    """[n] float64 size of the largest entry among a row's targets."""
    log_p, g_logp = stats.logp.double(), grads.logp.double()
    p = log_p.exp()

    def column(x: Tensor | None) -> Tensor | float:
        return 0.0 if x is None else x.double()[:, None]

    own = torch.zeros_like(g_logp)  # what the ids of a row send to this one, which may be there more than once
    for k in range(g_logp.shape[1]):
        own += g_logp[:, k : k + 1].where(tile.targets == tile.targets[:, k : k + 1], 0.0)
    # own - own p without its cancellation; what other ids send is on top
    g = -own * log_p.expm1() + p * (own - g_logp.sum(1, keepdim=True) + column(grads.lse))
    g = g - p * (log_p + column(stats.entropy)).nan_to_num(neginf=0.0) * column(grads.entropy)
    g = g + column(grads.mean_logit) / columns
    if grads.kl is not None and tile.reference is not None and log_q is not None:
        if tile.reference.direction == "forward":
            g = g + (p - log_q.double().exp()) * column(grads.kl)
        else:
            ratio = (log_p - log_q.double()).where(p > 0, 0.0)
            g = g + p * (ratio - column(stats.kl)) * column(grads.kl)
    if tile.head.softcap is not None:
        t = tile.temperature
        z = (stats.logp + stats.lse[:, None]).double() * (t.double()[:, None] if isinstance(t, Tensor) else t)
        g = g * (1 - (z / tile.head.softcap).square()).clamp(min=0.0)
    return (g * _per_t(tile)).abs().amax(1)


def _absolute_sum(tile: Tile, stats: TokenStats, grads: Grads) -> Tensor:
    """[n] float64 at least the sum of the sizes of a row's entries.

    An expected distance from the mean is at most twice the mean of what is never negative; log(p / q) is below zero by
    1/e at most, on average under p.
    """
    unsure = UNSURE - stats.logp.double().expm1()
    total = 2 * (grads.logp.double().abs() * unsure).sum(1)
    for g in (grads.lse, grads.mean_logit):
        total = total if g is None else total + g.double().abs()
    if grads.entropy is not None:
        total = total + 2 * stats.entropy.double() * grads.entropy.double().abs()
    if grads.kl is not None and stats.kl is not None:
        forward = tile.reference is not None and tile.reference.direction == "forward"
        far = 2.0 if forward else 2 * stats.kl.double() + 2 / math.e
        total = total + far * grads.kl.double().abs()
    per_t = _per_t(tile)
    return total * (per_t.squeeze(1).abs() if isinstance(per_t, Tensor) else abs(per_t))


def select(part: Share, vocab: int, gradient: Callable[[Tensor], Tensor]) -> Entries:
    """The largest entries of each row.

    Args:
        part: rows to look at, and what they may lose.
        vocab: V.
        gradient: [c] rows -> [c, V] gradient of their logits.
    """
    rows = part.look
    if not rows.numel():
        return Entries(rows, part.flat, part.lost, part.norm, None)
    found = [_largest(gradient(some), most(vocab), part.allowed) for some in rows.split(ROWS)]
    columns, values, counts, lost, norm = (torch.cat(x) for x in zip(*found, strict=True))
    few = counts >= 0
    kept = Kept(columns[few], values[few], counts[few])
    return Entries(rows[few], rows[~few], lost, norm, kept).with_unseen(part.flat, part.lost, part.norm)


def _largest(g: Tensor, few: int, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = g.abs().topk(few, dim=1).indices
    values = g.gather(1, columns)
    norm = torch.linalg.vector_norm(g, dim=1, dtype=torch.float64).square()
    kept = torch.nn.functional.pad(values.double().square().cumsum(1), (1, 0))
    lost = (norm[:, None] - kept).clamp_(min=0.0)  # of those that keep none, one, two ...
    enough = lost <= allowed
    fine = enough[:, -1] & norm.isfinite()
    counts = torch.where(fine, enough.int().argmax(1), -1)
    left_out = lost.gather(1, counts.clamp(min=0)[:, None]).squeeze(1).where(fine, 0.0)
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
