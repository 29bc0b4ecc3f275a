"""The whole head in csrc, matrix products and row sums in one pass, on machines for which it has products."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _C
from rlhf_kernels.backends import sparse
from rlhf_kernels.backends.native_rows import Rows, Sums, Upstream, address, strip_of
from rlhf_kernels.types import Entries, Grads, Head, Sinks, Tile

DTYPES = {
    torch.float32: _C.Dtype.float32,
    torch.bfloat16: _C.Dtype.bfloat16,
    torch.float16: _C.Dtype.float16,
}


def fits(tile: Tile) -> bool:
    """Whether csrc multiplies the matrices of this tile."""
    dtype = tile.hidden.dtype
    tensors = [tile.hidden, tile.head.weight]
    if tile.reference is not None:
        tensors += [tile.reference.hidden, tile.reference.head.weight]
    return _C.has_head() and dtype in DTYPES and all(x is not None and x.dtype == dtype for x in tensors)


class _Operands:
    """Hidden states and weight, their rows contiguous."""

    def __init__(self, hidden: Tensor, head: Head):
        assert head.weight is not None
        self._hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self._weight = head.weight if head.weight.stride(-1) == 1 else head.weight.contiguous()
        self.c = _C.Head(
            hidden=address(self._hidden),
            ld_hidden=self._hidden.stride(0),
            weight=address(self._weight),
            ld_weight=self._weight.stride(0),
            size=hidden.shape[1],
        )


def forward(tile: Tile, rows: Rows, sums: Sums, z: Tensor | None, z_ref: Tensor | None) -> None:
    """Fill the sums; keep the logits in ``z`` and ``z_ref`` ([n, V]) where given."""
    policy, ref = _Operands(tile.hidden, tile.head), tile.reference
    reference = _Operands(ref.hidden, ref.head) if ref else None
    _C.head_forward(
        DTYPES[tile.hidden.dtype], policy.c, reference.c if reference else _C.Head(), rows.work(), strip_of(z, 0),
        strip_of(z_ref, 0), rows.transform, rows.transform_ref, rows.targets(sums), sums.c,
    )  # fmt: skip


def backward(
    tile: Tile, z: Tensor, z_ref: Tensor | None, sums: Sums, grads: Grads, index: Tensor | None, sinks: Sinks
) -> None:
    """Gradients of the rows in ``index`` into the sinks."""
    rows, upstream, policy = Rows(tile), Upstream(grads, torch.float32), _Operands(tile.hidden, tile.head)
    index = None if index is None else index.contiguous()
    count = tile.hidden.shape[0] if index is None else index.numel()
    _C.head_backward(
        DTYPES[tile.hidden.dtype], policy.c, rows.work(count), address(index), strip_of(z, 0), strip_of(z_ref, 0),
        rows.transform, rows.targets(sums), sums.c, upstream.c, _into(sinks),
    )  # fmt: skip


def select(
    tile: Tile, z: Tensor, z_ref: Tensor | None, sums: Sums, grads: Grads, part: sparse.Share
) -> Entries:  # fmt: skip
    """The entries that matter of the rows to look at. They take the place of those rows' logits."""
    rows, upstream, index = Rows(tile), Upstream(grads, torch.float32), part.look
    count = index.numel()
    counts, norms = torch.empty(count, dtype=torch.int64), torch.empty(2, count, dtype=torch.float64)
    _C.head_select(
        rows.work(count), address(index), strip_of(z, 0), strip_of(z_ref, 0), rows.transform, rows.targets(sums),
        sums.c, upstream.c, float(part.allowed), address(part.floor), sparse.most(rows.vocab), address(counts),
        address(norms[0]), address(norms[1]),
    )  # fmt: skip
    few = counts >= 0
    entries = Entries(index[few], index[~few], norms[0], norms[1], (z, counts[few]))
    return entries.with_unseen(part.flat, part.lost, part.norm)


def multiply(tile: Tile, entries: Entries, sinks: Sinks) -> None:
    """Gradients of the rows of these entries into the sinks."""
    rows, policy, (z, counts) = Rows(tile), _Operands(tile.hidden, tile.head), entries.kept
    _C.head_sparse(
        DTYPES[tile.hidden.dtype], policy.c, rows.work(entries.rows.numel()), address(entries.rows), strip_of(z, 0),
        address(counts), _into(sinks),
    )  # fmt: skip


def _into(sinks: Sinks) -> _C.Sinks:
    return _C.Sinks(
        hidden=address(sinks.hidden),
        weight=address(sinks.weight),
        ld_weight=0 if sinks.weight is None else sinks.weight.stride(0),
        bias=address(sinks.bias),
        fresh=sinks.fresh,
        round_weight=sinks.weight is not None and sinks.weight.dtype == torch.bfloat16,
    )
