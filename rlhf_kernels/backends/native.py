"""The CPU backend. With AVX-512 csrc does everything; otherwise torch multiplies matrices and csrc does the rest.

Whatever the dtype, logits and their gradients are float32 (float64 for float64). Only where the machine multiplies
bfloat16 itself are gradients of bfloat16 heads rounded to it, on their way into the last two products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch  # must be loaded before csrc, which then shares its OpenMP runtime: two of them wait for each other
from torch import Tensor

from rlhf_kernels import _C
from rlhf_kernels.backends import native_head as whole
from rlhf_kernels.backends import sparse
from rlhf_kernels.backends.native_rows import Rows, Sums, Upstream, address, wide
from rlhf_kernels.types import Entries, Grads, Head, Sinks, Tile, TokenStats

STRIP_BYTES = 8 * 2**20  # of logits at a time: they stay in the last-level cache between the product and the sums
STRIP_COLUMNS = 8192  # at most, for few rows
FEWEST_COLUMNS = 512  # narrower products lose their speed

_C.isa()  # A wrong RLHF_KERNELS_ISA is said here, and not in the middle of a call.

# Logits that a backward has used up, for the next tile of the same call: fresh pages cost more than writing to them.
_spare: WeakKeyDictionary[Head, list[Tensor]] = WeakKeyDictionary()
# What the last call left, for the next one, unless the system needs the memory more. Calls of other threads find and
# leave tensors here at any moment, so a list is never looked at first: what ``pop`` gives is nobody else's.
_offered: list[Tensor] = []


class Residual(NamedTuple):
    z: Tensor  # [n, V] logits
    z_ref: Tensor | None
    sums: Sums


def residual_bytes(tile: Tile) -> int:
    """Bytes per row of the logits, of what is as long as the hidden state, and of packed strips and sums."""
    rows = Rows(tile)
    return rows.vocab * rows.dtype.itemsize * (2 if tile.reference else 1) + 16 * tile.hidden.shape[1] + 12288


def score(tile: Tile) -> TokenStats:
    """Statistics only; logits exist a strip at a time."""
    return _statistics(tile, None, None)[0]


def forward(tile: Tile) -> tuple[TokenStats, Residual]:
    """Statistics, and the logits."""
    n, ref = tile.hidden.shape[0], tile.reference
    rows = Rows(tile)
    z = _logits(tile.head, n, rows)
    z_ref = _logits(tile.head, n, rows) if ref else None
    stats, sums = _statistics(tile, z, z_ref)
    return stats, Residual(z, z_ref, sums)


def backward(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, sinks: Sinks
) -> None:
    """Gradients of the logits a strip at a time, each straight into the products with weight and hidden states."""
    rows = None if rows is None else rows.contiguous()
    if whole.fits(tile) and (sinks.weight is None or sinks.weight.stride(-1) == 1):
        whole.backward(tile, residual.z, residual.z_ref, residual.sums, grads, rows, sinks)
    else:
        _backward_by_torch(tile, residual, grads, rows, sinks)
    _used_up(tile.head, residual)


def entries_bytes(tile: Tile) -> int:
    """Bytes per row of entries: csrc has them once in the logits' place and once sorted by column."""
    few = sparse.most(Rows(tile).vocab)
    return 8 * few if whole.fits(tile) else sparse.entries_bytes(few)


def select(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, tolerance: float
) -> Entries:
    """The entries of each row's gradient that matter."""
    vocab, log_q = residual.z.shape[1], None
    if grads.kl is not None and residual.z_ref is not None:
        log_q = residual.z_ref.gather(1, tile.targets) - residual.sums.lse_ref()[:, None]
    part = sparse.share(tile, stats, grads, rows, vocab, log_q, tolerance, sparse.most(vocab))
    if whole.fits(tile):
        entries = whole.select(tile, residual.z, residual.z_ref, residual.sums, grads, part)
    else:
        entries = sparse.select(part, vocab, _gradient(tile, residual, grads))
    return entries._replace(kept=(entries.kept, residual))


def multiply(tile: Tile, entries: Entries, sinks: Sinks) -> None:
    """Each entry meets one row of the weight and one of the hidden states. Consumes what ``select`` was given."""
    kept, residual = entries.kept
    entries, weight = entries._replace(kept=kept), sinks.weight
    if not whole.fits(tile):
        sparse.multiply(tile, entries, sinks)
    elif weight is None or weight.stride(-1) == 1:
        whole.multiply(tile, entries, sinks)
    else:
        packed = weight.contiguous()
        whole.multiply(tile, entries, sinks._replace(weight=packed))
        weight.copy_(packed)
    if not entries.others.numel():  # otherwise they have gone before
        _used_up(tile.head, residual)


def _gradient(tile: Tile, residual: Residual, grads: Grads) -> Callable[[Tensor], Tensor]:
    given, upstream = Rows(tile), Upstream(grads, residual.z.dtype)

    def gradient(rows: Tensor) -> Tensor:
        out = residual.z.new_empty(rows.numel(), residual.z.shape[1])
        given.grad(residual.sums, residual.z, residual.z_ref, 0, upstream, rows, out)
        return out

    return gradient


def _used_up(head: Head, residual: Residual) -> None:
    if head not in _spare:
        _spare[head] = []
        finalize(head, _offer, _spare[head]).atexit = False
    _spare[head].extend(z for z in (residual.z, residual.z_ref) if z is not None)


def _logits(head: Head, n: int, rows: Rows) -> Tensor:
    """[n, V], uninitialized; in pages that were used before, where they suffice. Those that do not are given back."""
    numbers = n * rows.vocab
    for pool in (_spare.get(head, []), _offered):
        for z in _taken(pool):
            old = torch.empty(0, dtype=rows.dtype).set_(z.untyped_storage())
            if old.numel() >= numbers:
                return old[:numbers].view(n, rows.vocab)
    return torch.empty(n, rows.vocab, dtype=rows.dtype)


def _taken(pool: list[Tensor]) -> Iterator[Tensor]:
    with suppress(IndexError):
        while True:
            yield pool.pop()


def _offer(spare: list[Tensor]) -> None:
    """What a call that is over has used up stays, as long as the system has no better use for it."""
    _offered[:] = [z for z in spare if _C.offer_pages(z.data_ptr(), z.untyped_storage().nbytes())]


def _backward_by_torch(tile: Tile, residual: Residual, grads: Grads, rows: Tensor | None, sinks: Sinks) -> None:
    weight, dtype = tile.head.weight, wide(tile.hidden.dtype)
    hidden = (tile.hidden if rows is None else tile.hidden[rows]).to(dtype)
    given, upstream = Rows(tile), Upstream(grads, dtype)
    strips = list(_strips(given.vocab, hidden.shape[0], dtype))
    scratch = _Scratch(hidden.shape[0], dtype)
    grad_hidden = None
    if sinks.hidden is not None:
        grad_hidden = sinks.hidden if sinks.hidden.dtype == dtype else torch.empty_like(hidden)
    for s in strips:
        g = scratch.strip(s)
        given.grad(residual.sums, residual.z[:, s], _part(residual.z_ref, s), s.start, upstream, rows, g)
        if grad_hidden is not None:
            if weight is None:
                grad_hidden[:, s] = g
            elif s.start == 0:
                torch.mm(g, weight[s].to(dtype), out=grad_hidden)
            else:
                grad_hidden.addmm_(g, weight[s].to(dtype))
        if sinks.weight is not None and sinks.weight.dtype != dtype:
            sinks.weight[s] = g.T @ hidden
        elif sinks.weight is not None:
            sinks.weight[s].addmm_(g.T, hidden, beta=0 if sinks.fresh else 1)
        if sinks.bias is not None:
            sinks.bias[s] = g.sum(0) if sinks.fresh else sinks.bias[s] + g.sum(0)
    if sinks.hidden is not None and grad_hidden is not None and grad_hidden is not sinks.hidden:
        sinks.hidden.copy_(grad_hidden)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over packed sequences (https://arxiv.org/abs/1506.02438, Eq. 16).

    Args:
        rewards: [N] float32 or float64.
        values: [N] of the same dtype, as ``bootstrap``.
        cu_seqlens: [S+1] int32 or int64.
        mask: [N] bool; false positions are stepped over and are zero in the results. None: all true.
        bootstrap: [S] value of the state after the last token. None: zero.
        gamma: discount.
        lam: GAE lambda.

    Returns:
        (advantages, returns), [N] in the dtype of ``values``.

    >>> gae(torch.ones(3), torch.zeros(3), torch.tensor([0, 2, 3]), None, None, 1.0, 1.0)[0]
    tensor([2., 1., 1.])
    """
    rewards, values, ends = rewards.contiguous(), values.contiguous(), cu_seqlens.long().contiguous()
    mask = None if mask is None else mask.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.contiguous()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    _C.gae(
        values.dtype == torch.float64, address(rewards), address(values), address(ends), address(mask),
        address(bootstrap), address(advantages), address(returns), ends.numel() - 1, gamma, lam,
        torch.get_num_threads(),
    )  # fmt: skip
    return advantages, returns


def _statistics(tile: Tile, z: Tensor | None, z_ref: Tensor | None) -> tuple[TokenStats, Sums]:
    """Statistics and what they are made of; the logits are left in ``z`` and ``z_ref`` ([n, V]) if those are given."""
    rows, sums, ref = Rows(tile), Sums.start(tile), tile.reference
    if whole.fits(tile):
        whole.forward(tile, rows, sums, z, z_ref)
        return rows.statistics(sums), sums
    product, product_ref = _Product(tile.hidden, tile.head), _Product(ref.hidden, ref.head) if ref else None
    for s in _strips(rows.vocab, tile.hidden.shape[0], rows.dtype):
        part = product.strip(s, z)
        rows.push(sums, part, product_ref.strip(s, z_ref) if product_ref else None, s.start)
    return rows.statistics(sums), sums


class _Scratch:
    """The same memory for one strip after another; the first is as wide as any."""

    def __init__(self, rows: int, dtype: torch.dtype):
        self._rows, self._dtype, self._memory = rows, dtype, None

    def strip(self, s: slice) -> Tensor:
        columns = s.stop - s.start
        if self._memory is None:
            self._memory = torch.empty(self._rows, columns, dtype=self._dtype)
        return self._memory.view(-1)[: self._rows * columns].view(self._rows, columns)


class _Product:
    """hidden @ weight.T in the wide dtype."""

    def __init__(self, hidden: Tensor, head: Head):
        self._hidden, self._weight = hidden.to(wide(hidden.dtype)), head.weight
        self._scratch = _Scratch(hidden.shape[0], self._hidden.dtype)

    def strip(self, s: slice, out: Tensor | None) -> Tensor:
        """[n, strip], in its place of ``out`` ([n, V]) if given, otherwise until the next strip."""
        part = self._scratch.strip(s) if out is None else out[:, s]
        if self._weight is None:
            return part.copy_(self._hidden[:, s])
        return torch.mm(self._hidden, self._weight[s].to(self._hidden.dtype).T, out=part)


def _strips(vocab: int, n: int, dtype: torch.dtype) -> Iterator[slice]:
    width = STRIP_BYTES // (dtype.itemsize * max(1, n)) // 64 * 64
    width = min(max(width, FEWEST_COLUMNS), STRIP_COLUMNS)
    return (slice(i, min(i + width, vocab)) for i in range(0, vocab, width))


def _part(x: Tensor | None, s: slice) -> Tensor | None:
    return None if x is None else x[:, s]
