"""Some rows of a tile, and of what its forward kept: those move to the front, as there is no room for a second copy."""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.operands import Residual
from rlhf_kernels.types import Grads, Tile, TokenStats

ROWS, COLUMNS = 8, 512  # that a program moves at a time


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["index"])
def compact_kernel(x, index, R, V, ld, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row index[i] of ``x`` becomes row i. As index ascends, no row is overwritten before it has moved."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for first in tl.range(0, R, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        i = first + tl.arange(0, ROWS)[:, None]
        inside = (i < R) & (columns < V)
        row = tl.load(index + i, mask=i < R, other=0)
        found = tl.load(x + row * ld + columns, mask=inside, other=0.0)
        tl.debug_barrier()  # other threads may still have to read what this one is about to overwrite
        tl.store(x + i.to(tl.int64) * ld + columns, found, mask=inside)
        tl.debug_barrier()


def _to_the_front(x: Tensor, index: Tensor) -> Tensor:
    compact_kernel[(triton.cdiv(x.shape[1], COLUMNS),)](
        x, index, index.numel(), x.shape[1], x.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
    )
    return x[: index.numel()]


def only(
    tile: Tile, stats: TokenStats, grads: Grads, residual: Residual, rows: Tensor
) -> tuple[Tile, TokenStats, Grads, Residual]:
    """The rows ``rows`` [r], ascending. Uses up the residual."""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    t, ref = tile.temperature, tile.reference
    some = replace(
        tile,
        hidden=tile.hidden[rows],
        targets=tile.targets[rows],
        temperature=t[rows] if isinstance(t, Tensor) else t,
        reference=None if ref is None else replace(ref, hidden=ref.hidden[rows]),
    )
    if tile.head.weight is None:  # these are a user's logits
        kept, kept_ref = residual.kept[rows], None
    else:
        kept = _to_the_front(residual.kept, rows)
        kept_ref = None if residual.kept_ref is None else _to_the_front(residual.kept_ref, rows)
    anchor, log_s, anchor_ref, log_s_ref = residual.norms
    left = Residual(kept, kept_ref, (anchor[rows], log_s[rows], pick(anchor_ref), pick(log_s_ref)))
    return some, stats.each(lambda x: x[rows]), grads.each(lambda g: g[rows]), left
