"""The fold over a strip of logits of a simple head: bfloat16, without bias, softcap or reference.

Most heads are simple, and of them a program takes many columns of a row, whose sums stay in registers until the last.
It works in powers of two: t = (z - a) log2(e) costs one multiply-add, and 2^t one instruction. They round by less than
the float32 product that made z. Its sums are in those units too, and become nats in ``finish.py``.

Legend: N rows, V vocabulary, T pieces of columns; partial sums are [planes, T, N], as those of ``head.py``.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.calculus import LOG2E, exp2, row_scale
from rlhf_kernels.backends.triton.operands import Rows
from rlhf_kernels.backends.triton.table import Fold

LOWEST: tl.constexpr = tl.constexpr(-1000.0)  # 2^t is zero long before, and zero times this is no NaN


def is_simple(rows: Rows) -> bool:
    """Whether these kernels serve the head."""
    policy = rows.policy
    return policy.weight is not None and rows.keeps_exponentials and policy.bias is None and policy.softcap is None


@triton.jit
def _merged(s, drop, total, most, s_more, drop_more, total_more, most_more):
    return s + s_more, drop + drop_more, total + total_more, tl.maximum(most, most_more)


@triton.jit(do_not_specialize=["N", "T"], do_not_specialize_on_alignment=["targets", "temperature"])
def strip_kernel(
    given, targets, temperature, anchor, partials, own, kept,
    N, K, T, ld_given, ld_kept, first, last, scale, per_t,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PER_TOKEN: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Columns first .. last of the head, which ``given`` holds: sums, and (KEEP) their exponentials."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_n = row < N
    begin = first + tl.program_id(1) * (BLOCK * STEPS)
    a = tl.load(anchor + row, mask=in_n, other=0.0) * LOG2E
    factor = row_scale(temperature, per_t, row, in_n, PER_TOKEN) * (scale * LOG2E) + tl.zeros_like(a)
    s = tl.zeros((ROWS, BLOCK), tl.float32)
    drop = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    most = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    of_row = given + (row * ld_given)[:, None]
    for step in tl.static_range(STEPS):
        columns = begin + step * BLOCK + tl.arange(0, BLOCK)[None, :]
        in_v = columns < last
        z = tl.load(of_row + (columns - first), mask=in_n[:, None] & in_v, other=0.0)
        t = tl.where(in_v, tl.fma(z, factor[:, None], -a[:, None]), float("-inf"))
        e = exp2(t)
        s += e
        drop = tl.fma(e, tl.maximum(t, LOWEST), drop)
        total += tl.where(in_v, t, 0.0)
        most = tl.maximum(most, t)
        if KEEP:
            tl.store(kept + (row * ld_kept)[:, None] + columns, e.to(kept.dtype.element_ty), mask=in_n[:, None] & in_v)
    s, drop, total, most = tl.reduce((s, drop, total, most), 1, _merged)
    plane = tl.cast(T, tl.int64) * N
    at = (begin // (BLOCK * STEPS)).to(tl.int64) * N + row
    tl.store(partials + at, s, mask=in_n)
    tl.store(partials + plane + at, drop, mask=in_n)
    tl.store(partials + 2 * plane + at, total, mask=in_n)
    tl.store(partials + 3 * plane + at, most, mask=in_n)
    for k in tl.range(0, K):  # pyright: ignore[reportGeneralTypeIssues]
        target = tl.load(targets + row * K + k, mask=in_n, other=-1)
        here = in_n & (target >= begin) & (target < begin + BLOCK * STEPS) & (target < last)
        its = tl.load(given + row * ld_given + (target - first), mask=here, other=0.0)
        tl.store(own + row * K + k, tl.fma(its, factor, -a), mask=here)


def fold_strip(
    rows: Rows,
    first: int,
    given: Tensor,
    anchor: Tensor,
    partials: Tensor,
    own: Tensor,
    kept: Tensor | None,
    fold: Fold,
) -> None:
    """Launch on float32 logits of columns ``first`` onwards, before scale and temperature."""
    columns, t = given.shape[1], rows.temperature
    strip_kernel[(triton.cdiv(rows.count, fold.rows), triton.cdiv(columns, fold.width))](
        given, rows.targets, t, anchor, partials, own, kept,
        rows.count, rows.targets.shape[1], partials.shape[1], given.stride(0),
        0 if kept is None else kept.stride(0), first, first + columns, rows.policy.scale, rows.per_t,
        ROWS=fold.rows, BLOCK=fold.columns, STEPS=fold.steps, PER_TOKEN=t is not None, KEEP=kept is not None,
        num_warps=fold.num_warps,
    )  # fmt: skip
