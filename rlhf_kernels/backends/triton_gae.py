"""Packed advantages on a GPU in two launches, whitening included, however the rows fall into sequences.

What the rows after row t pay it is ``C[t] = gamma * lam * A[t'] + gamma * V[t']``, t' being the next row that counts.
So ``A[t] = r[t] - V[t] + C[t]``, and C obeys a recurrence of one number:

    C[t] = gamma * bootstrap                                         where t is the last row of its sequence
         = gamma lam * (r[t+1] - V[t+1] + C[t+1]) + gamma * V[t+1]   where row t+1 counts
         = C[t+1]                                                    where it does not

Each step is ``x -> value + decay * x``, and such maps compose. The first launch composes those of each program's rows;
the second composes the programs', and walks the rows again from the true C at their right end. A is affine in that C
too, so the first launch's sums give mean and variance before any row is finished. Double in registers: what is whitened
was never rounded. No atomics: every sum has one order.

Legend: N packed rows, S sequences, P programs, each with ``tiles`` tiles of BLOCK rows.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
from __future__ import annotations

import contextlib

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8  # eight rows to a thread
PROGRAMS = 256  # at most, so that one vector holds what they hand on
FAN = 512  # boundaries looked at in one round of a search
SUMS = 8  # decay, value; count; and the sums of a, reach, a^2, a * reach, reach^2: A = a + reach * C


@triton.jit
def _after(decay_right, value_right, decay, value):
    """The map of a row after those to its right. A closed one forgets them, even what is not finite."""
    return decay * decay_right, tl.where(decay == 0, value, value + decay * value_right)


@triton.jit
def double(high, low):
    """Kernels take no double: a number comes as a float32 and what that lacks."""
    return tl.full((), 0.0, tl.float64) + high + low


@triton.jit
def sequence_of(cu_seqlens, S, row, FAN: tl.constexpr):
    """The sequence of a row: how many end at or before it."""
    base = row * 0
    left = base + S
    while left > 0:
        step = (left + FAN - 1) // FAN
        probe = (tl.arange(0, FAN) + 1) * step
        ends = tl.load(cu_seqlens + base + probe, mask=probe <= left, other=0)
        passed = tl.sum(((ends <= row) & (probe <= left)).to(tl.int64), 0) * step
        base += passed
        left = tl.minimum(step - 1, left - passed)
    return base


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def rows_of(cu_seqlens, start, o, low, high, N, S):
    """(whether it exists, whether it is the last of its sequence, its sequence) of the rows start + o."""
    inside = o < tl.minimum(N - start, 2147483647).to(tl.int32)
    past = o * 0
    left = (high - low).to(tl.int32)
    while left > 0:
        half = (left + 1) // 2
        end = tl.load(cu_seqlens + low + past + half, mask=inside, other=0)
        past = tl.where(inside & (end - start <= o), past + half, past)
        left -= half
    end = tl.load(cu_seqlens + low + past + 1, mask=inside & (low + past < S), other=0)
    return inside, inside & (end - start == o + 1), low + past


@triton.jit
def _tile(rewards, values, cu_seqlens, mask, bootstrap, start, o, low, high, N, S, gamma, decay):
    """(kept, rewards, values, decay, what follows) of the rows start + o, whose sequences lie in low .. high.

    The last two are the map from what follows the tile to what follows each row.
    """
    inside, last, sequence = rows_of(cu_seqlens, start, o, low, high, N, S)
    kept, next_kept = inside, inside & (last == 0)
    if mask is not None:
        kept &= tl.load(mask + start + o, mask=inside, other=0) != 0
        next_kept &= tl.load(mask + start + o + 1, mask=next_kept, other=0) != 0
    r = tl.load(rewards + start + o, mask=kept, other=0.0)
    v = tl.load(values + start + o, mask=kept, other=0.0)
    r_next = tl.load(rewards + start + o + 1, mask=next_kept, other=0.0).to(tl.float64)
    v_next = tl.load(values + start + o + 1, mask=next_kept, other=0.0).to(tl.float64)
    step = tl.where(last, 0.0, tl.where(next_kept, decay, 1.0))
    paid = decay * r_next + (gamma - decay) * v_next
    if bootstrap is not None:
        paid += gamma * tl.load(bootstrap + sequence, mask=last, other=0.0).to(tl.float64)
    step, paid = tl.associative_scan((step, paid), 0, _after, reverse=True)
    return kept, r, v, step, paid


@triton.jit
def gae_carry_kernel(
    rewards, values, cu_seqlens, mask, bootstrap, sums, N, S, tiles, gamma, gamma_low, decay, decay_low,
    BLOCK: tl.constexpr, FAN: tl.constexpr, WHITEN: tl.constexpr,
):  # fmt: skip
    """``sums`` [8, P]: each program's map; and the sums that, with what follows, make mean and variance."""
    program, P = tl.program_id(0), tl.num_programs(0)
    gamma, decay = double(gamma, gamma_low), double(decay, decay_low)
    begin = program.to(tl.int64) * tiles * BLOCK
    high = sequence_of(cu_seqlens, S, begin + tiles * BLOCK, FAN)
    o = tl.arange(0, BLOCK)
    zero = gamma * 0
    program_step, program_paid = zero + 1, zero
    count, a_1, reach_1, a_2, a_reach, reach_2 = zero, zero, zero, zero, zero, zero
    for i in range(tiles):
        start = begin + (tiles - 1 - i) * BLOCK
        low = sequence_of(cu_seqlens, S, start, FAN)
        kept, r, v, step, paid = _tile(
            rewards, values, cu_seqlens, mask, bootstrap, start, o, low, high, N, S, gamma, decay
        )
        reach, paid = _after(program_step, program_paid, step, paid)
        first = tl.where(o == 0, reach, 0.0), tl.where(o == 0, paid, 0.0), tl.where(kept, 1.0, 0.0).to(tl.float64)
        program_step, program_paid, kept_here = tl.reduce(first, 0, _add3)
        high = low
        if WHITEN:
            a, reach = tl.where(kept, r.to(tl.float64) - v + paid, 0.0), tl.where(kept, reach, 0.0)
            moments = tl.reduce((a, reach, a * a, a * reach, reach * reach), 0, _add5)
            count, a_1, reach_1 = count + kept_here, a_1 + moments[0], reach_1 + moments[1]
            a_2, a_reach, reach_2 = a_2 + moments[2], a_reach + moments[3], reach_2 + moments[4]
    tl.store(sums + program, program_step)
    tl.store(sums + P + program, program_paid)
    if WHITEN:
        tl.store(sums + 2 * P + program, count)
        tl.store(sums + 3 * P + program, a_1)
        tl.store(sums + 4 * P + program, reach_1)
        tl.store(sums + 5 * P + program, a_2)
        tl.store(sums + 6 * P + program, a_reach)
        tl.store(sums + 7 * P + program, reach_2)


@triton.jit
def _mean_and_scale(sums, P, i, follows, eps):
    """Of all advantages, from what follows each program and its sums."""
    here = i < P
    count = tl.load(sums + 2 * P + i, mask=here, other=0.0)
    a_1 = tl.load(sums + 3 * P + i, mask=here, other=0.0)
    reach_1 = tl.load(sums + 4 * P + i, mask=here, other=0.0)
    a_2 = tl.load(sums + 5 * P + i, mask=here, other=0.0)
    a_reach = tl.load(sums + 6 * P + i, mask=here, other=0.0)
    reach_2 = tl.load(sums + 7 * P + i, mask=here, other=0.0)
    follows = tl.where(reach_1 == 0, 0.0, follows)  # what reaches no row may be infinite
    a_1 += follows * reach_1
    a_2 += follows * (2 * a_reach + follows * reach_2)
    count, a_1, a_2 = tl.reduce((count, a_1, a_2), 0, _add3)
    count = tl.maximum(count, 1.0)
    mean = a_1 / count
    return mean, 1 / tl.sqrt(tl.maximum(a_2 / count - mean * mean, 0.0) + eps)


@triton.jit
def gae_kernel(
    rewards, values, cu_seqlens, mask, bootstrap, sums, advantages, returns, N, S, tiles, gamma, gamma_low, decay,
    decay_low, eps, BLOCK: tl.constexpr, FAN: tl.constexpr, CARRIES: tl.constexpr, WHITEN: tl.constexpr,
):  # fmt: skip
    program, P = tl.program_id(0), tl.num_programs(0)
    gamma, decay = double(gamma, gamma_low), double(decay, decay_low)
    begin = program.to(tl.int64) * tiles * BLOCK
    i = tl.arange(0, CARRIES)
    right = i + 1 < P
    program_step = tl.load(sums + i + 1, mask=right, other=0.0)
    follows = tl.load(sums + P + i + 1, mask=right, other=0.0)
    follows = tl.associative_scan((program_step, follows), 0, _after, reverse=True)[1]
    mean, scale = gamma * 0, gamma * 0 + 1
    if WHITEN:
        mean, scale = _mean_and_scale(sums, P, i, follows, eps)
    carry = tl.sum(tl.where(i == program, follows, 0.0), 0)
    high = sequence_of(cu_seqlens, S, begin + tiles * BLOCK, FAN)
    o = tl.arange(0, BLOCK)
    for k in range(tiles):
        start = begin + (tiles - 1 - k) * BLOCK
        low = sequence_of(cu_seqlens, S, start, FAN)
        kept, r, v, step, paid = _tile(
            rewards, values, cu_seqlens, mask, bootstrap, start, o, low, high, N, S, gamma, decay
        )
        paid = _after(0.0, carry, step, paid)[1]
        carry = tl.sum(tl.where(o == 0, paid, 0.0), 0)
        high = low
        inside = o < tl.minimum(N - start, 2147483647).to(tl.int32)
        result = r.to(tl.float64) + paid
        tl.store(returns + start + o, tl.where(kept, result, 0.0), mask=inside)
        tl.store(advantages + start + o, tl.where(kept, (result - v - mean) * scale, 0.0), mask=inside)


def pair(number: float) -> tuple[float, float]:
    high = float(np.float32(number))
    return high, number - high


def _launch(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None,
    gamma: float, lam: float, eps: float | None, block: int | None = None, programs: int = PROGRAMS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    N, S = rewards.numel(), cu_seqlens.numel() - 1
    if N == 0:
        return advantages, returns
    block = block or BLOCK * 4 // values.element_size()  # float64 takes twice the registers
    tiles = -(-N // (block * programs))
    P = -(-N // (block * tiles))
    given = rewards, values, cu_seqlens, mask, bootstrap
    sums = torch.empty(SUMS, P, dtype=torch.float64, device=values.device)
    discounts = *pair(gamma), *pair(gamma * lam)
    constants = {"BLOCK": block, "FAN": min(FAN, block), "WHITEN": eps is not None, "num_warps": WARPS}
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        gae_carry_kernel[(P,)](*given, sums, N, S, tiles, *discounts, **constants)
        constants["CARRIES"] = min(64, programs) if P <= 64 else programs  # two shapes and not ten to compile
        given = *given, sums, advantages, returns
        gae_kernel[(P,)](*given, N, S, tiles, *discounts, eps or 0.0, **constants)
    return advantages, returns


def gae(
    rewards: Tensor,  # [N] float32 or float64, like values and bootstrap
    values: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1] int32 or int64
    mask: Tensor | None,  # [N] bool, None is all true
    bootstrap: Tensor | None,  # [S], None is zero
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] and zero where ``mask`` is false; contiguous tensors of one GPU."""
    return _launch(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, None)


def whitened_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None,
    gamma: float, lam: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``gae``, with advantages of mean zero and variance one over ``mask``, in as many launches."""
    return _launch(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, eps)
