"""Statistics of a linear head in one pass: a matrix product whose tiles are folded before they leave the registers.

Legend: N rows, V vocabulary, H hidden; T tiles of BLOCK_V columns. Partial sums are [planes, T, N].
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.calculus import (
    LOG2E,
    exp2,
    exponentials,
    reference_sums_of,
    row_scale,
    store_own,
    store_reference_sums,
    store_sums,
    sums_of,
    to_logits,
)
from rlhf_kernels.backends.triton.operands import Operand, Rows, described
from rlhf_kernels.backends.triton.simple import LOWEST, is_simple
from rlhf_kernels.backends.triton.table import Blocks

GROUP_BYTES = 20_000_000  # of hidden states, beside which the L2 has room for what the products read and write
RESCUE_PROGRAMS = (
    128  # share the vocabulary of each block of far rows; where there is no such block they return at once
)


@triton.jit
def logits_tile(
    x, w, in_n, n, rows, in_v, v, H, ld_x, ld_w,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    SCATTERED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_V] of x @ w.T in float32; x and w are tensor descriptors (TMA) or pointers.

    The rows are n and those that follow, or SCATTERED.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if TMA:
        for h in tl.range(0, H, BLOCK_H):
            acc = tl.dot(x.load([n.to(tl.int32), h]), w.load([v, h]).T, acc)
    else:
        # 64 bits to the tile, 32 within it: wide offsets of every element would not leave registers for the sums.
        # Rows and columns that do not exist read the first one and are never stored.
        if SCATTERED:
            x_rows = x + rows[:, None] * ld_x
        else:
            x_rows = (x + n * ld_x) + tl.where(in_n, tl.arange(0, BLOCK_N), 0)[:, None] * ld_x
        w_rows = (w + v.to(tl.int64) * ld_w) + tl.where(in_v, tl.arange(0, BLOCK_V), 0)[:, None] * ld_w
        for h in tl.range(0, H, BLOCK_H):
            offs_h = h + tl.arange(0, BLOCK_H)[None, :]
            a = tl.load(x_rows + offs_h, mask=offs_h < H, other=0.0)
            b = tl.load(w_rows + offs_h, mask=offs_h < H, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def simple_sums_of(t, in_v):
    """As ``sums_of``, of t = d log2(e): see ``simple.py``. Also e."""
    total = tl.sum(tl.where(in_v, t, 0.0), 1)
    e = exp2(t)
    drop = tl.sum(e * tl.maximum(t, LOWEST), 1)
    return tl.sum(e, 1), drop, total, tl.max(t, 1), e


@triton.jit(do_not_specialize=["N", "T", "group"], do_not_specialize_on_alignment=["targets", "temperature"])
def head_kernel(
    x, w, bias, x_ref, w_ref, bias_ref, targets, temperature, anchor, anchor_ref, far,
    partials, own, kept, kept_ref,
    N, V, H, H_ref, K, T, group, ld_x, ld_w, ld_x_ref, ld_w_ref, ld_kept, scale, softcap, scale_ref, softcap_ref, per_t,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_BIAS_REF: tl.constexpr, HAS_CAP_REF: tl.constexpr, FORWARD_KL: tl.constexpr,
    KEEP: tl.constexpr, KEEP_EXP: tl.constexpr, SIMPLE: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """Each tile's sums, and (KEEP) its exponentials or logits.

    RESCUE: only the rows that ``far`` lists, and T sums for all tiles. SIMPLE: the head is what ``simple.py`` calls so.
    """
    # Blocks of rows run fastest, a group of them at a time whose hidden states fit the L2; each reads the weight once.
    start = tl.program_id(0) // (group * T) * group
    height = tl.minimum(tl.cdiv(N, BLOCK_N) - start, group)
    within_group = tl.program_id(0) - start * T
    n = (start + within_group % height).to(tl.int64) * BLOCK_N
    slot = within_group // height
    rows = n + tl.arange(0, BLOCK_N)
    in_n = rows < N
    if RESCUE:
        count = tl.load(far + N)
        if n >= count:
            return
        in_n = rows < count
        rows = tl.load(far + rows, mask=in_n, other=0).to(tl.int64)
    a = tl.load(anchor + rows, mask=in_n, other=0.0)[:, None]
    scale_n = row_scale(temperature, per_t, rows[:, None], in_n[:, None], PER_TOKEN)
    plane = tl.cast(T, tl.int64) * N
    at = slot.to(tl.int64) * N + rows
    for tile in tl.range(slot, tl.cdiv(V, BLOCK_V), T):
        v = tl.cast(tile, tl.int32) * BLOCK_V
        columns = v + tl.arange(0, BLOCK_V)
        in_v = columns < V
        inside = in_n[:, None] & in_v[None, :]
        if RESCUE:
            to, within = v, rows[:, None] * ld_kept + tl.arange(0, BLOCK_V)[None, :]
        else:
            to, within = n * ld_kept + v, tl.arange(0, BLOCK_N)[:, None] * ld_kept + tl.arange(0, BLOCK_V)[None, :]
        d = logits_tile(x, w, in_n, n, rows, in_v, v, H, ld_x, ld_w, BLOCK_N, BLOCK_V, BLOCK_H, TMA, PRECISION, RESCUE)
        if SIMPLE:
            d = tl.fma(d, scale_n * (scale * LOG2E) + tl.zeros_like(a), -a * LOG2E)
            d = tl.where(in_v[None, :], d, float("-inf"))
            s, drop, total, most, e = simple_sums_of(d, in_v[None, :])
            store_own(own, targets, K, d, rows, in_n, v, columns[None, :], V, BLOCK_V)
            if KEEP:  # up to the row's stride, where e is zero: an odd V would make each store one of a single number
                there = in_n[:, None] & (columns < ld_kept)[None, :]
                tl.store(kept + to + within, e.to(kept.dtype.element_ty), mask=there)
        else:
            d = to_logits(d, bias, columns[None, :], in_v[None, :], scale, softcap, scale_n, HAS_BIAS, HAS_CAP)
            if KEEP and not KEEP_EXP:
                tl.store(kept + to + within, d, mask=inside)
            d = tl.where(in_v[None, :], d - a, float("-inf"))
            s, drop, total, most = sums_of(d, in_v[None, :])
            store_own(own, targets, K, d, rows, in_n, v, columns[None, :], V, BLOCK_V)
            if KEEP_EXP:
                tl.store(kept + to + within, exponentials(d).to(kept.dtype.element_ty), mask=inside)
        store_sums(partials, plane, at, in_n, RESCUE and tile >= T, s, drop, total, most)
        if HAS_REF:
            d_ref = logits_tile(
                x_ref, w_ref, in_n, n, rows, in_v, v, H_ref, ld_x_ref, ld_w_ref,
                BLOCK_N, BLOCK_V, BLOCK_H, TMA, PRECISION, RESCUE,
            )  # fmt: skip
            d_ref = to_logits(
                d_ref, bias_ref, columns[None, :], in_v[None, :], scale_ref, softcap_ref, scale_n,
                HAS_BIAS_REF, HAS_CAP_REF,
            )  # fmt: skip
            if KEEP:
                tl.store(kept_ref + to + within, d_ref, mask=inside)
            a_ref = tl.load(anchor_ref + rows, mask=in_n, other=0.0)[:, None]
            d_ref = tl.where(in_v[None, :], d_ref - a_ref, float("-inf"))
            s, gap, most = reference_sums_of(d, d_ref, FORWARD_KL)
            store_reference_sums(partials, plane, at, in_n, RESCUE and tile >= T, s, gap, most)


def fold_head(
    rows: Rows, anchor: Tensor, anchor_ref: Tensor | None, far: Tensor | None, partials: Tensor, own: Tensor,
    kept: Tensor | None, kept_ref: Tensor | None, blocks: Blocks, tma: bool, precision: str,
) -> None:  # fmt: skip
    """Launch; ``far`` asks for the rescue of its rows, ``tma`` for tensor descriptors."""
    policy, ref = rows.policy, rows.reference
    N, V, T = rows.count, rows.vocab, partials.shape[1]

    def operands(o: Operand | None) -> tuple[Any, Any]:
        if o is None:
            return None, None
        return described(o, blocks) if tma else (o.hidden, o.weight)

    tiles = triton.cdiv(N, blocks.BLOCK_N)
    row_bytes = sum(o.size * o.hidden.element_size() for o in (policy, ref) if o is not None)
    group = max(1, min(tiles, GROUP_BYTES // (blocks.BLOCK_N * row_bytes)))
    head_kernel[(tiles * T,)](
        *operands(policy), policy.bias, *operands(ref), ref and ref.bias, rows.targets, rows.temperature,
        anchor, anchor_ref, far, partials, own, kept, kept_ref,
        N, V, policy.size, ref.size if ref else 0, rows.targets.shape[1], T, group, policy.ld_hidden, policy.ld_weight,
        ref.ld_hidden if ref else 0, ref.ld_weight if ref else 0, 0 if kept is None else kept.stride(0),
        policy.scale, policy.softcap or 1.0, ref.scale if ref else 1.0, (ref and ref.softcap) or 1.0, rows.per_t,
        TMA=tma, PRECISION=precision,
        HAS_BIAS=policy.bias is not None, HAS_CAP=policy.softcap is not None, PER_TOKEN=rows.temperature is not None,
        HAS_REF=ref is not None, HAS_BIAS_REF=ref is not None and ref.bias is not None,
        HAS_CAP_REF=ref is not None and ref.softcap is not None, FORWARD_KL=rows.forward_kl,
        KEEP=kept is not None, KEEP_EXP=kept is not None and rows.keeps_exponentials,
        SIMPLE=is_simple(rows) and far is None, RESCUE=far is not None, **blocks._asdict(),
    )  # fmt: skip
