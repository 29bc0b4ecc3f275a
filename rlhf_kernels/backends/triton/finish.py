"""The two ends of the fold: each row's anchor before it, statistics from partial sums after it.

Partial sums of a tile are float32; they are added in float64, in a fixed order.
Legend: N rows, K targets of each, T tiles.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.calculus import row_scale, to_logits
from rlhf_kernels.backends.triton.operands import Operand, Rows
from rlhf_kernels.backends.triton.table import Pieces

# A row is folded again if its largest logit lies so many nats from its anchor: that is far from overflow, and near
# enough that the entropy, a difference of two sums of that size, keeps its digits.
FAR = tl.constexpr(32.0)
ROWS = 16  # that one program finishes
TILES = 32  # that it reads at a time, each of which has an accumulator of its own until the end


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["targets", "temperature"])
def anchor_kernel(
    x, w, bias, targets, temperature, anchor, N, V, H, K, ld_x, ld_w, scale, softcap, per_t,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """The logit of the first target; 0 where that is -inf, and NaN, for this row alone, where it is no column."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_n = row < N
    column = tl.load(targets + row * K, mask=in_n, other=0)
    exists = (column >= 0) & (column < V)
    column = tl.where(exists, column, 0)
    if HAS_WEIGHT:
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for h in tl.range(0, H, BLOCK):
            offs_h = h + tl.arange(0, BLOCK)[None, :]
            inside = in_n[:, None] & (offs_h < H)
            a = tl.load(x + row[:, None] * ld_x + offs_h, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(w + column[:, None] * ld_w + offs_h, mask=inside, other=0.0).to(tl.float32)
            acc += a * b
        z = tl.sum(acc, 1)
    else:
        z = tl.load(x + row * ld_x + column, mask=in_n, other=0.0).to(tl.float32)
    scale_n = row_scale(temperature, per_t, row, in_n, PER_TOKEN)
    z = to_logits(z, bias, column, exists, scale, softcap, scale_n, HAS_BIAS, HAS_CAP)
    z = tl.where(z == float("-inf"), 0.0, z)
    tl.store(anchor + row, tl.where(exists, z, float("nan")), mask=in_n)


def anchors(rows: Rows, operand: Operand, anchor: Tensor, pieces: Pieces) -> None:
    """Fill ``anchor`` [N]."""
    anchor_kernel[(triton.cdiv(rows.count, pieces.rows),)](
        operand.hidden, operand.weight, operand.bias, rows.targets, rows.temperature, anchor,
        rows.count, rows.vocab, operand.size, rows.targets.shape[1], operand.ld_hidden, operand.ld_weight,
        operand.scale, operand.softcap or 1.0, rows.per_t,
        ROWS=pieces.rows, BLOCK=min(512, triton.next_power_of_2(operand.size)), HAS_WEIGHT=operand.weight is not None,
        HAS_BIAS=operand.bias is not None, HAS_CAP=operand.softcap is not None,
        PER_TOKEN=rows.temperature is not None, num_warps=pieces.num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T"])
def finish_kernel(
    partials, own, anchor, anchor_ref, flags, logp, entropy, lse, mean, top1, kl, log_s, log_s_ref,
    N, V, K, T, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, HAS_REF: tl.constexpr, FORWARD_KL: tl.constexpr,
    SIMPLE: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """Statistics from the sums of all tiles. RESCUE: only of rows with a flag; else the kernel leaves a flag where a
    row lies far from its anchor, and its largest logit as the next anchor. SIMPLE: d is in units of ln 2.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = rows < N
    if RESCUE:
        in_n &= tl.load(flags + rows, mask=in_n, other=0) != 0
        if tl.max(in_n.to(tl.int32), 0) == 0:
            return
    plane = tl.cast(T, tl.int64) * N
    s = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
    most = tl.full((BLOCK_T, BLOCK_N), float("-inf"), tl.float32)
    drop, total, s_ref, gap, most_ref = s, s, s, s, most
    for first in tl.range(0, T, BLOCK_T):
        tiles = first + tl.arange(0, BLOCK_T)
        inside = (tiles < T)[:, None] & in_n[None, :]
        at = tiles.to(tl.int64)[:, None] * N + rows[None, :]
        s += tl.load(partials + at, mask=inside, other=0.0).to(tl.float64)
        drop += tl.load(partials + plane + at, mask=inside, other=0.0).to(tl.float64)
        total += tl.load(partials + 2 * plane + at, mask=inside, other=0.0).to(tl.float64)
        most = tl.maximum(most, tl.load(partials + 3 * plane + at, mask=inside, other=float("-inf")))
        if HAS_REF:
            s_ref += tl.load(partials + 4 * plane + at, mask=inside, other=0.0).to(tl.float64)
            gap += tl.load(partials + 5 * plane + at, mask=inside, other=0.0).to(tl.float64)
            most_ref = tl.maximum(most_ref, tl.load(partials + 6 * plane + at, mask=inside, other=float("-inf")))
    s, drop, total, most = tl.sum(s, 0), tl.sum(drop, 0), tl.sum(total, 0), tl.max(most, 0)
    if HAS_REF:
        s_ref, gap, most_ref = tl.sum(s_ref, 0), tl.sum(gap, 0), tl.max(most_ref, 0)
    at_top = tl.load(own + rows * K, mask=in_n, other=0.0) >= most
    unit = tl.full((), 0.6931471805599453 if SIMPLE else 1.0, tl.float64)
    drop, total, most = drop * unit, total * unit, (most * unit).to(tl.float32)
    a = tl.load(anchor + rows, mask=in_n, other=0.0)
    log_sum = tl.log(s)
    tl.store(log_s + rows, log_sum.to(tl.float32), mask=in_n)
    tl.store(lse + rows, (log_sum + a).to(tl.float32), mask=in_n)
    tl.store(entropy + rows, _at_least_zero(log_sum - _over(drop, s)).to(tl.float32), mask=in_n)
    tl.store(mean + rows, (_over(total, tl.zeros((BLOCK_N,), tl.float64) + V) + a).to(tl.float32), mask=in_n)
    tl.store(top1 + rows, at_top.to(tl.float32), mask=in_n)
    for k in tl.range(0, K):
        d = tl.load(own + rows * K + k, mask=in_n, other=0.0).to(tl.float64) * unit
        tl.store(logp + rows * K + k, -_at_least_zero(log_sum - d).to(tl.float32), mask=in_n)
    needs = (most > FAR) | (most < -FAR)
    if HAS_REF:
        a_ref = tl.load(anchor_ref + rows, mask=in_n, other=0.0)
        log_ref = tl.log(s_ref)
        tl.store(log_s_ref + rows, log_ref.to(tl.float32), mask=in_n)
        ahead = s_ref if FORWARD_KL else s
        shift = log_sum - log_ref if FORWARD_KL else log_ref - log_sum
        tl.store(kl + rows, _at_least_zero(_over(gap, ahead) + shift).to(tl.float32), mask=in_n)
        needs |= (most_ref > FAR) | (most_ref < -FAR)
        if not RESCUE:
            tl.store(anchor_ref + rows, tl.where(needs, most_ref + a_ref, a_ref), mask=in_n)
    if not RESCUE:
        tl.store(anchor + rows, tl.where(needs, most + a, a), mask=in_n)
        tl.store(flags + rows, needs.to(tl.int8), mask=in_n)


@triton.jit(do_not_specialize=["N"])
def far_kernel(flags, far, N, BLOCK: tl.constexpr):
    """``far`` [N + 1]: the rows with a flag, ascending, and last how many they are. One program walks over all rows."""
    count = tl.full((), 0, tl.int32)
    for first in tl.range(0, N, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, BLOCK)
        needs = (tl.load(flags + rows, mask=rows < N, other=0) != 0).to(tl.int32)
        tl.store(far + count + tl.cumsum(needs, 0) - 1, rows, mask=needs != 0)
        count += tl.sum(needs, 0)
    tl.store(far + N, count)


@triton.jit
def _over(x, y):
    """x / y in float64 by Newton's method from float32: the compiler's own division is a call that spills."""
    guess = (1.0 / y.to(tl.float32)).to(tl.float64)
    return x * (guess * (2.0 - y * guess))


@triton.jit
def _at_least_zero(x):
    """Rounding may not make a positive quantity negative; a NaN stays one."""
    return tl.where(x < 0, 0.0, x)


def finish(
    rows: Rows, partials: Tensor, own: Tensor, anchor: Tensor, anchor_ref: Tensor | None,
    flags: Tensor, stats: tuple[Tensor | None, ...], log_s: Tensor, log_s_ref: Tensor | None, *,
    rescue: bool, simple: bool,
) -> None:  # fmt: skip
    """Launch; ``stats`` are logp [N, K], entropy, lse, mean_logit, top1 and kl to fill."""
    finish_kernel[(triton.cdiv(rows.count, ROWS),)](
        partials, own, anchor, anchor_ref, flags, *stats, log_s, log_s_ref,
        rows.count, rows.vocab, rows.targets.shape[1], partials.shape[1],
        BLOCK_N=ROWS, BLOCK_T=min(TILES, max(16, triton.next_power_of_2(partials.shape[1]))),
        HAS_REF=rows.reference is not None, FORWARD_KL=rows.forward_kl, SIMPLE=simple,
        RESCUE=rescue, num_warps=4,
    )  # fmt: skip


def far_rows(flags: Tensor) -> Tensor:
    """[N + 1] int32, as ``far_kernel`` leaves it."""
    N = flags.numel()
    far = torch.empty(N + 1, dtype=torch.int32, device=flags.device)
    far_kernel[(1,)](flags, far, N, BLOCK=min(4096, max(128, triton.next_power_of_2(N))), num_warps=8)
    return far
