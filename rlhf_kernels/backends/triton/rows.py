"""The fold over logits that lie in memory: a strip that a matrix product left there, or a trainer's own.

Legend: N rows, V vocabulary, T pieces of columns; partial sums are [planes, T, N], as those of ``head.py``.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.calculus import (
    exponentials,
    reference_sums_of,
    row_scale,
    store_own,
    store_reference_sums,
    store_sums,
    sums_of,
    to_logits,
)
from rlhf_kernels.backends.triton.operands import Rows
from rlhf_kernels.backends.triton.table import Pieces


def piece(vocab: int, pieces: Pieces) -> int:
    """Columns that one program takes; every strip but the last must be a multiple of it.

    Never fewer than the program has threads: two of them would hold the same logit, and the one might read it after the
    other has overwritten it in place.
    """
    return min(pieces.columns, max(32 * pieces.num_warps, int(triton.next_power_of_2(vocab))))


@triton.jit(do_not_specialize=["N", "T"], do_not_specialize_on_alignment=["targets", "temperature"])
def rows_kernel(
    given, given_ref, bias, bias_ref, targets, temperature, anchor, anchor_ref, flags, partials, own, kept, kept_ref,
    N, V, K, T, ld_given, ld_given_ref, ld_kept, first, scale, softcap, scale_ref, softcap_ref, per_t,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_BIAS_REF: tl.constexpr, HAS_CAP_REF: tl.constexpr, FORWARD_KL: tl.constexpr,
    KEEP: tl.constexpr, KEEP_EXP: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """Columns first .. V of the head; ``given`` starts at ``first`` and may be where ``kept`` wants its logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_n = row < N
    if RESCUE:
        in_n &= tl.load(flags + row, mask=in_n, other=0) != 0
        if tl.max(in_n.to(tl.int32), 0) == 0:
            return
    piece = tl.program_id(1).to(tl.int64) * BLOCK
    columns = first + piece + tl.arange(0, BLOCK)[None, :]
    in_v = columns < V
    inside = in_n[:, None] & in_v
    scale_n = row_scale(temperature, per_t, row[:, None], in_n[:, None], PER_TOKEN)
    plane = tl.cast(T, tl.int64) * N
    at = (first + piece) // BLOCK * N + row
    to = row[:, None] * ld_kept + columns
    d = tl.load(given + row[:, None] * ld_given + (columns - first), mask=inside, other=0.0).to(tl.float32)
    d = to_logits(d, bias, columns, in_v, scale, softcap, scale_n, HAS_BIAS, HAS_CAP)
    if KEEP and not KEEP_EXP:
        tl.store(kept + to, d, mask=inside)
    d = tl.where(in_v, d - tl.load(anchor + row, mask=in_n, other=0.0)[:, None], float("-inf"))
    s, drop, total, most = sums_of(d, in_v)
    store_sums(partials, plane, at, in_n, False, s, drop, total, most)
    store_own(own, targets, K, d, row, in_n, first + piece, columns, V, BLOCK)
    if KEEP_EXP:
        tl.store(kept + to, exponentials(d).to(kept.dtype.element_ty), mask=inside)
    if HAS_REF:
        d_ref = tl.load(given_ref + row[:, None] * ld_given_ref + (columns - first), mask=inside, other=0.0)
        d_ref = to_logits(
            d_ref.to(tl.float32), bias_ref, columns, in_v, scale_ref, softcap_ref, scale_n, HAS_BIAS_REF, HAS_CAP_REF
        )
        if KEEP:
            tl.store(kept_ref + to, d_ref, mask=inside)
        d_ref = tl.where(in_v, d_ref - tl.load(anchor_ref + row, mask=in_n, other=0.0)[:, None], float("-inf"))
        s, gap, most = reference_sums_of(d, d_ref, FORWARD_KL)
        store_reference_sums(partials, plane, at, in_n, False, s, gap, most)


def fold_rows(
    rows: Rows, first: int, given: Tensor, given_ref: Tensor | None, anchor: Tensor, anchor_ref: Tensor | None,
    flags: Tensor | None, partials: Tensor, own: Tensor, kept: Tensor | None, kept_ref: Tensor | None, pieces: Pieces,
) -> None:  # fmt: skip
    """Launch on logits of columns ``first`` onwards, before bias, scale, softcap and temperature."""
    policy, ref = rows.policy, rows.reference
    block = piece(rows.vocab, pieces)
    rows_kernel[(triton.cdiv(rows.count, pieces.rows), triton.cdiv(given.shape[1], block))](
        given, given_ref, policy.bias, ref and ref.bias, rows.targets, rows.temperature, anchor, anchor_ref, flags,
        partials, own, kept, kept_ref,
        rows.count, rows.vocab, rows.targets.shape[1], partials.shape[1], given.stride(0),
        0 if given_ref is None else given_ref.stride(0), 0 if kept is None else kept.stride(0), first,
        policy.scale, policy.softcap or 1.0, ref.scale if ref else 1.0, (ref and ref.softcap) or 1.0, rows.per_t,
        ROWS=pieces.rows, BLOCK=block, HAS_BIAS=policy.bias is not None, HAS_CAP=policy.softcap is not None,
        PER_TOKEN=rows.temperature is not None, HAS_REF=ref is not None,
        HAS_BIAS_REF=ref is not None and ref.bias is not None, HAS_CAP_REF=ref is not None and ref.softcap is not None,
        FORWARD_KL=rows.forward_kl, KEEP=kept is not None, KEEP_EXP=kept is not None and rows.keeps_exponentials,
        RESCUE=flags is not None, num_warps=pieces.num_warps,
    )  # fmt: skip
