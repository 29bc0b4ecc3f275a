"""Some rows of a tile, and of what its forward kept: those move to the front, as there is no room for a second copy.

Of R rows that stay, those among the first R stay where they are; the others fill the gaps. No row is read and
overwritten in one launch then, so that all of them move at once. Their order is another one, the same in every run.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.operands import Residual
from rlhf_kernels.types import Grads, Tile, TokenStats

COLUMNS = 4096  # that a program moves


def order_of(rows: Tensor, count: int) -> Tensor:
    """[R] the order in which the R ascending ``rows`` of ``count`` are to stand: row i stays at place i if it is one of
    them and i < R; the others take the places that are left.
    """
    among = torch.zeros(count, dtype=torch.bool, device=rows.device)
    among.index_fill_(0, rows, True)
    stays = among[: rows.numel()]
    gap = (~stays).cumsum(0)
    # The last of the rows are those beyond the first R: as many as there are gaps.
    return torch.where(stays, stays.cumsum(0) - 1, rows.numel() - gap)


@triton.jit(do_not_specialize_on_alignment=["source"])
def compact_kernel(x, source, V, ld, COLUMNS: tl.constexpr):
    """Row source[i] of ``x`` becomes row i."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(source + i)
    if row == i:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < V
    tl.store(x + i * ld + columns, tl.load(x + row * ld + columns, mask=inside), mask=inside)


def _to_the_front(x: Tensor, source: Tensor) -> Tensor:
    R, V = source.numel(), x.shape[1]
    compact_kernel[(R, triton.cdiv(V, COLUMNS))](x, source, V, x.stride(0), COLUMNS=COLUMNS, num_warps=4)
    return x[:R]


def only(
    tile: Tile, stats: TokenStats, grads: Grads, residual: Residual, rows: Tensor
) -> tuple[Tile, TokenStats, Grads, Residual]:
    """The rows ``rows`` [r], in the order in which ``order_of`` has put them. Uses up the residual."""

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
