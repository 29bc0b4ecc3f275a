"""Generalised advantage estimation over packed sequences in plain torch: no loop over tokens, no host synchronisation.

Legend: N packed rows, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,  # [N] float32 or float64, like values and bootstrap
    values: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    mask: Tensor | None,  # [N] bool, None is all true
    bootstrap: Tensor | None,  # [S], None is zero
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] and zero where ``mask`` is false."""
    rows, sequences = rewards.numel(), cu_seqlens.numel() - 1
    if rows == 0 or sequences == 0:
        return torch.zeros_like(values), torch.zeros_like(values)
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    zero = values.new_zeros(())
    position = torch.arange(rows, device=rewards.device)
    of = torch.repeat_interleave(torch.arange(sequences, device=rewards.device), cu_seqlens.diff(), output_size=rows)
    end = cu_seqlens.to(position.dtype)[of + 1]

    # The state after a token is that of the next row that counts, or the one after the sequence.
    coming = position.where(kept, rows).flip(0).cummin(0).values.flip(0)
    coming = torch.cat([coming[1:], coming.new_full((1,), rows)])
    inside = coming < end
    after = zero.expand(rows) if bootstrap is None else bootstrap[of]
    following = torch.where(inside, values[coming.clamp(max=rows - 1)], after)
    delta = torch.where(kept, rewards + gamma * following - values, zero)

    # A[t] = delta[t] + decay[t] * A[t+1], composed with itself over twice the distance in each round.
    decay = torch.ones_like(values).masked_fill(kept, gamma * lam).masked_fill(position + 1 >= end, 0.0)
    longest = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" else rows
    advantages, step = delta, 1
    while step < longest:
        advantages = torch.cat([advantages[:-step] + decay[:-step] * advantages[step:], advantages[-step:]])
        decay = torch.cat([decay[:-step] * decay[step:], torch.zeros_like(decay[-step:])])
        step *= 2
    return advantages.where(kept, zero), (advantages + values).where(kept, zero)
