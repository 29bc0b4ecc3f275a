"""Per-token rewards of RLHF on a GPU in two launches: the price of KL, the score on a sequence's last row, and its KL.

A row adds its KL to that of the rows after it, and counts those that count; both sums start afresh at the last row of a
sequence. So the row where the count becomes one has the score, and the sequence's first row has its KL. As in
``triton_gae``, whose blocks these are: the first launch sums each program's rows, the second joins programs from the
right and walks the rows again.

Legend: N packed rows, S sequences, P programs.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton_gae import BLOCK, FAN, PROGRAMS, WARPS, double, pair, rows_of, sequence_of


@triton.jit
def _join(open_right, kl_right, count_right, open_, kl, count):
    """The sums of a row and those to its right; ``open_`` is zero where a sequence ends."""
    return (
        open_ * open_right,
        tl.where(open_ == 0, kl, kl + kl_right),
        tl.where(open_ == 0, count, count + count_right),
    )


@triton.jit
def _tile(logp, ref_logp, cu_seqlens, mask, start, o, low, high, N, S, most, KL: tl.constexpr):
    """(inside, kept, sequence, own KL, and the sums from each row to the end of the tile) of the rows start + o."""
    inside, last, sequence = rows_of(cu_seqlens, start, o, low, high, N, S)
    kept = inside
    if mask is not None:
        kept &= tl.load(mask + start + o, mask=inside, other=0) != 0
    x = tl.load(logp + start + o, mask=kept, other=0.0).to(tl.float64)
    x -= tl.load(ref_logp + start + o, mask=kept, other=0.0)
    if KL == 2:
        x = 0.5 * x * x
    if KL == 3:
        x = tl.where(x < -most, -most, x)
        x = tl.exp(-x) - 1 + x  # in double the difference keeps all that float32 can hold
    open_, count = tl.where(last, 0.0, 1.0), tl.where(kept, 1.0, 0.0)  # whether it is one, float32 never mistakes
    open_, kl, count = tl.associative_scan((open_, x, count), 0, _join, reverse=True)
    return inside, kept, sequence, x, open_, kl, count


@triton.jit
def rewards_carry_kernel(
    logp, ref_logp, cu_seqlens, mask, sums, N, S, tiles, most,
    BLOCK: tl.constexpr, FAN: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """``sums`` [3, P]: of each program's rows up to the first end of a sequence."""
    program, P = tl.program_id(0), tl.num_programs(0)
    begin = program.to(tl.int64) * tiles * BLOCK
    high = sequence_of(cu_seqlens, S, begin + tiles * BLOCK, FAN)
    o = tl.arange(0, BLOCK)
    open_0, kl_0, count_0 = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float32)
    for i in range(tiles):
        start = begin + (tiles - 1 - i) * BLOCK
        low = sequence_of(cu_seqlens, S, start, FAN)
        _, _, _, _, open_, kl, count = _tile(logp, ref_logp, cu_seqlens, mask, start, o, low, high, N, S, most, KL)
        high = low
        open_, kl, count = _join(open_0, kl_0, count_0, open_, kl, count)
        open_0 = tl.sum(tl.where(o == 0, open_, 0.0), 0)
        kl_0 = tl.sum(tl.where(o == 0, kl, 0.0), 0)
        count_0 = tl.sum(tl.where(o == 0, count, 0.0), 0)
    tl.store(sums + program, open_0)
    tl.store(sums + P + program, kl_0)
    tl.store(sums + 2 * P + program, count_0)


@triton.jit
def rewards_kernel(
    logp, ref_logp, cu_seqlens, mask, sums, scores, beta_at, rewards, kl_of, N, S, tiles, most, beta, beta_low, clip,
    BLOCK: tl.constexpr, FAN: tl.constexpr, CARRIES: tl.constexpr, KL: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    program, P = tl.program_id(0), tl.num_programs(0)
    price = double(beta, beta_low)
    if beta_at is not None:
        price += tl.load(beta_at)
    begin = program.to(tl.int64) * tiles * BLOCK
    i = tl.arange(0, CARRIES)
    right = i + 1 < P
    sums_of = (
        tl.load(sums + i + 1, mask=right, other=0.0).to(tl.float32),
        tl.load(sums + P + i + 1, mask=right, other=0.0),
        tl.load(sums + 2 * P + i + 1, mask=right, other=0.0).to(tl.float32),
    )
    carried = tl.associative_scan(sums_of, 0, _join, reverse=True)
    kl_0 = tl.sum(tl.where(i == program, carried[1], 0.0), 0)
    count_0 = tl.sum(tl.where(i == program, carried[2], 0.0), 0)
    high = sequence_of(cu_seqlens, S, begin + tiles * BLOCK, FAN)
    o = tl.arange(0, BLOCK)
    for k in range(tiles):
        start = begin + (tiles - 1 - k) * BLOCK
        low = sequence_of(cu_seqlens, S, start, FAN)
        inside, kept, sequence, own, open_, kl, count = _tile(
            logp, ref_logp, cu_seqlens, mask, start, o, low, high, N, S, most, KL
        )
        high = low
        kl = tl.where(open_ == 0, kl, kl + kl_0)
        so_far = tl.where(open_ == 0, count, count + count_0)
        kl_0 = tl.sum(tl.where(o == 0, kl, 0.0), 0)
        count_0 = tl.sum(tl.where(o == 0, so_far, 0.0), 0)
        if CLIP:
            own = tl.where(own > clip, clip, tl.where(own < -clip, -clip, own))
        score = tl.load(scores + sequence, mask=kept & (so_far == 1), other=0.0)
        tl.store(rewards + start + o, tl.where(kept, score - price * own, 0.0), mask=inside)
        first = tl.load(cu_seqlens + sequence, mask=inside, other=-1) == start + o
        tl.store(kl_of + sequence, kl, mask=inside & first)


def shaped_rewards(
    scores: Tensor,  # [S] float32 or float64, like logp and ref_logp
    logp: Tensor,  # [N]
    ref_logp: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1] int32 or int64
    mask: Tensor | None,  # [N] bool, None is all true
    beta: float | Tensor,  # a number, or 0-d
    kl: str,  # "k1", "k2" or "k3"
    kl_clip: float | None,
    block: int | None = None,
    programs: int = PROGRAMS,
) -> tuple[Tensor, Tensor]:
    """(rewards [N], zero where ``mask`` is false; KL [S], unclipped); contiguous tensors of one GPU."""
    N, S = logp.numel(), cu_seqlens.numel() - 1
    rewards, kl_of = torch.empty_like(logp), torch.zeros_like(scores)  # of sequences without rows nobody writes
    if N == 0:
        return rewards, kl_of
    block = block or BLOCK // 4  # three sums to a row take more registers than one
    tiles = -(-N // (block * programs))
    P = -(-N // (block * tiles))
    sums = torch.empty(3, P, dtype=torch.float64, device=logp.device)
    given = logp, ref_logp, cu_seqlens, mask, sums
    most = math.log(torch.finfo(logp.dtype).max) - 8  # beyond it k3's exponential would overflow
    at = beta if isinstance(beta, Tensor) else None
    price = (0.0, 0.0) if isinstance(beta, Tensor) else pair(float(beta))
    constants: dict[str, Any] = {"BLOCK": block, "FAN": min(FAN, block), "KL": int(kl[1]), "num_warps": WARPS}
    with torch.cuda.device(logp.device) if logp.is_cuda else contextlib.nullcontext():
        rewards_carry_kernel[(P,)](*given, N, S, tiles, most, **constants)
        constants |= {"CARRIES": min(64, programs) if P <= 64 else programs, "CLIP": kl_clip is not None}
        outs = scores, at, rewards, kl_of
        rewards_kernel[(P,)](*given, *outs, N, S, tiles, most, *price, float(kl_clip or 0.0), **constants)
    return rewards, kl_of
