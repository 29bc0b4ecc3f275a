"""Plain torch on one tile: runs everywhere, and says in the open what the other backends do.

The vocabulary is walked in strips, so half-precision weights are widened a strip at a time: statistics are
those of float32 logits whatever the dtype. Sums over the vocabulary are taken in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.backends import sparse
from rlhf_kernels.types import Entries, Grads, Head, Sinks, Tile, TokenStats

STRIP = 2048  # columns at a time
SCRATCH = 6 * STRIP  # numbers per row that are alive beside the logits while a strip is worked on


class Residual(NamedTuple):
    """Logits, and each row's log-sum-exp in two parts: subtracted one after the other they cost log p no digits,
    where their sum, rounded to float32 at 80, would cost five.
    """

    z: Tensor  # [n, V]
    norm: tuple[Tensor, Tensor]  # [n] largest logit, [n] log of the mass relative to it
    z_ref: Tensor | None
    norm_ref: tuple[Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def width(tile: Tile) -> int:
    """V, the columns that exist."""
    return tile.hidden.shape[1] if tile.head.weight is None else tile.head.weight.shape[0]


def residual_bytes(tile: Tile) -> int:
    return (width(tile) + SCRATCH) * wide(tile.hidden.dtype).itemsize * (2 if tile.reference else 1)


def _strips(tile: Tile) -> Iterator[slice]:
    return (slice(i, min(i + STRIP, width(tile))) for i in range(0, width(tile), STRIP))


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64): bfloat16 on a GPU accumulates there, all other halves are widened first."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(wide(a.dtype)) @ b.to(wide(b.dtype))


def _logits(hidden: Tensor, head: Head, strip: slice, temperature: float | Tensor) -> Tensor:
    """[n, strip] of softcap(logit_scale * (hidden @ weight.T + bias)) / temperature."""
    if head.weight is None:
        z = hidden[:, strip].to(wide(hidden.dtype), copy=True)
    else:
        z = _product(hidden, head.weight[strip].T)
    if head.bias is not None:
        z += head.bias[strip].to(z.dtype)
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z.div_(_column(temperature))


def _zero_times(weights: Tensor, x: Tensor) -> Tensor:
    """weights * x where a weight of zero wins over an infinite x: 0 log 0 = 0."""
    return (weights * x).masked_fill_(weights == 0, 0.0)


class _Fold:
    """Running softmax sums of rows, strip after strip, all relative to the largest logit so far.

    The weighted sum is of z - max and not of z: logits around 2000 would leave no digits for the entropy.
    """

    def __init__(self, n: int, device: torch.device):
        self.most = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
        self.mass, self.drop, self.gap = torch.zeros(3, n, dtype=torch.float64, device=device)

    def push(self, z: Tensor, other: Tensor | None) -> None:
        most = torch.maximum(self.most, z.amax(1).double())
        down = (self.most - most).nan_to_num_(neginf=0.0)  # before the first strip there is no mass to move
        shrink = (self.most - most).exp_().nan_to_num_(0.0)
        below = z - most.to(z.dtype)[:, None]
        e = below.exp().nan_to_num_(0.0)
        if other is not None:
            self.gap = self.gap * shrink + _zero_times(e, z - other).sum(1, dtype=torch.float64)
        self.drop = (self.drop + self.mass * down) * shrink
        self.drop += below.mul_(e).masked_fill_(e == 0, 0.0).sum(1, dtype=torch.float64)
        self.mass = self.mass * shrink + e.sum(1, dtype=torch.float64)
        self.most = most

    def lse(self) -> Tensor:
        return self.most + self.mass.log()

    def norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.most.to(dtype), self.mass.log().to(dtype)


def _statistics(tile: Tile, strips: Iterable[tuple[slice, Tensor, Tensor | None]]) -> tuple[TokenStats, _Fold, _Fold]:
    """The statistics, and the sums of policy and reference they were made of."""
    n, device, dtype = tile.hidden.shape[0], tile.hidden.device, wide(tile.hidden.dtype)
    forward_kl = tile.reference is not None and tile.reference.direction == "forward"
    policy, reference = _Fold(n, device), _Fold(n, device)
    target = torch.zeros(tile.targets.shape, dtype=torch.float64, device=device)
    total = torch.zeros(n, dtype=torch.float64, device=device)
    for strip, z, z_ref in strips:
        policy.push(z, None if forward_kl else z_ref)
        if z_ref is not None:
            reference.push(z_ref, z if forward_kl else None)
        inside, column = _locate(tile.targets, strip)
        target = torch.where(inside, z.gather(1, column).double(), target)
        total += z.sum(1, dtype=torch.float64)
    lse, kl = policy.lse(), None
    if tile.reference is not None:
        ahead, behind = (reference, policy) if forward_kl else (policy, reference)
        kl = (ahead.gap / ahead.mass - ahead.lse() + behind.lse()).clamp_(min=0.0).to(dtype)
    stats = TokenStats(
        logp=(target - lse[:, None]).clamp_(max=0.0).to(dtype),
        entropy=(policy.mass.log() - policy.drop / policy.mass).clamp_(min=0.0).to(dtype),
        lse=lse.to(dtype),
        mean_logit=(total / width(tile)).to(dtype),
        top1=(target[:, 0] >= policy.most).to(dtype),
        kl=kl,
    )
    return stats, policy, reference


def _locate(targets: Tensor, strip: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in the strip, and a column of it for each (any for the others)."""
    inside = (targets >= strip.start) & (targets < strip.stop)
    return inside, (targets - strip.start).clamp(0, strip.stop - strip.start - 1)


def score(tile: Tile) -> TokenStats:
    def strips() -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        ref, t = tile.reference, tile.temperature
        for s in _strips(tile):
            yield s, _logits(tile.hidden, tile.head, s, t), _logits(ref.hidden, ref.head, s, t) if ref else None

    return _statistics(tile, strips())[0]


def forward(tile: Tile) -> tuple[TokenStats, Residual]:
    def filled(hidden: Tensor, head: Head) -> Tensor:
        z = torch.empty(hidden.shape[0], width(tile), dtype=wide(hidden.dtype), device=hidden.device)
        for s in _strips(tile):
            z[:, s] = _logits(hidden, head, s, tile.temperature)
        return z

    z = filled(tile.hidden, tile.head)
    z_ref = filled(tile.reference.hidden, tile.reference.head) if tile.reference else None
    views = ((s, z[:, s], None if z_ref is None else z_ref[:, s]) for s in _strips(tile))
    stats, policy, reference = _statistics(tile, views)
    return stats, Residual(z, policy.norm(z.dtype), z_ref, reference.norm(z.dtype))


def _grad_logits(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, s: slice
) -> Tensor:
    """[r, strip] of the one line of calculus, then back through temperature, softcap and scale."""

    def pick(x: Tensor) -> Tensor:
        return x if rows is None else x[rows]

    def column(x: Tensor) -> Tensor:
        return pick(x)[:, None]

    z = pick(residual.z[:, s])
    temperature = column(tile.temperature) if isinstance(tile.temperature, Tensor) else tile.temperature
    log_p = z - column(residual.norm[0]) - column(residual.norm[1])
    p = log_p.exp()
    of_p = -pick(grads.logp).sum(1, keepdim=True)
    g = p * (of_p if grads.lse is None else of_p + column(grads.lse))
    if grads.entropy is not None:
        g -= _zero_times(p, log_p + column(stats.entropy)) * column(grads.entropy)
    if grads.mean_logit is not None:
        g += column(grads.mean_logit) / width(tile)
    if grads.kl is not None and tile.reference is not None and residual.z_ref is not None:
        log_q = pick(residual.z_ref[:, s]) - column(residual.norm_ref[0]) - column(residual.norm_ref[1])
        if tile.reference.direction == "forward":
            g += (p - log_q.exp()) * column(grads.kl)
        elif stats.kl is not None:
            g += _zero_times(p, log_p - log_q - column(stats.kl)) * column(grads.kl)
    inside, index = _locate(pick(tile.targets), s)
    g.scatter_add_(1, index, torch.where(inside, pick(grads.logp), 0.0))
    if tile.head.softcap is not None:
        g *= 1 - (z * temperature / tile.head.softcap).square_()
    return g.mul_(tile.head.logit_scale).div_(temperature)


def entries_bytes(tile: Tile) -> int:
    return sparse.entries_bytes(sparse.most(width(tile)))


def select(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, tolerance: float
) -> Entries:
    def gradient(some: Tensor) -> Tensor:
        return torch.cat([_grad_logits(tile, residual, stats, grads, some, s) for s in _strips(tile)], dim=1)

    log_q = None
    if grads.kl is not None and residual.z_ref is not None:
        log_q = residual.z_ref.gather(1, tile.targets) - residual.norm_ref[0][:, None] - residual.norm_ref[1][:, None]
    v = width(tile)
    part = sparse.share(tile, stats, grads, rows, v, log_q, tolerance, sparse.most(v))
    return sparse.select(part, v, gradient)


multiply = sparse.multiply


def _leave(part: Tensor, sink: Tensor, fresh: bool) -> None:
    if fresh:
        sink.copy_(part)
    else:
        sink += part


def backward(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, sinks: Sinks
) -> None:
    hidden = tile.hidden if rows is None else tile.hidden[rows]
    weight = tile.head.weight
    total = None if sinks.hidden is None or weight is None else torch.zeros_like(hidden, dtype=wide(hidden.dtype))
    for s in _strips(tile):
        g = _grad_logits(tile, residual, stats, grads, rows, s)
        if sinks.bias is not None:
            _leave(g.sum(0), sinks.bias[s], sinks.fresh)
        if weight is None:
            if sinks.hidden is not None:
                sinks.hidden[:, s] = g
            continue
        # float16 would lose small gradients, so only bfloat16 is rounded before a product, and only on a GPU
        g = g.to(torch.bfloat16) if g.is_cuda and hidden.dtype == torch.bfloat16 else g
        if total is not None:
            total += _product(g, weight[s])
        if sinks.weight is not None:
            _leave(_product(g.T, hidden), sinks.weight[s], sinks.fresh)
    if total is not None and sinks.hidden is not None:
        sinks.hidden.copy_(total)
