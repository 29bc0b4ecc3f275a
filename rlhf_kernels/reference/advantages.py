"""Advantages in textbook words: float64 Python loops over packed sequences."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    cu = cu_seqlens.tolist()
    return list(pairwise(cu))


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), Schulman et al. 2016 eq. 16, as if only the positions of the mask existed."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    for s, (start, end) in enumerate(bounds(cu_seqlens)):
        steps = [i for i in range(start, end) if mask is None or mask[i]]
        next_value = 0.0 if bootstrap is None else float(bootstrap[s])
        for k, i in enumerate(steps):
            total, discount = 0.0, 1.0
            for j_position in range(k, len(steps)):  # the sum of the definition, not the recurrence
                j = steps[j_position]
                after = float(values[steps[j_position + 1]]) if j_position + 1 < len(steps) else next_value
                total += discount * (float(rewards[j]) + gamma * after - float(values[j]))
                discount *= gamma * lam
            advantages[i], returns[i] = total, total + float(values[i])
    if whiten:
        advantages = whiten_(advantages, mask)
    return advantages, returns


def whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Mean zero and (biased) variance one over the mask, zero elsewhere; ``shift_mean=False`` puts the mean back."""
    kept = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.bool()
    out = torch.zeros(x.shape, dtype=torch.float64)
    if not kept.any():
        return out
    chosen = x[kept].double()
    mean, variance = chosen.mean(), ((chosen - chosen.mean()) ** 2).mean()
    out[kept] = (chosen - mean) / torch.sqrt(variance + eps) + (0.0 if shift_mean else mean)
    return out


whiten_ = whiten  # gae has an argument of this name


def shaped_rewards(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float,
    mask: Tensor | None = None,
    kl: str = "k1",
    kl_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Ziegler et al. 2019 eq. 2: rewards [N], the score on the last token of the mask; and KL [S], unclipped."""
    rewards = torch.zeros(logp.shape, dtype=torch.float64)
    per_sequence = torch.zeros(scores.shape, dtype=torch.float64)
    for s, (start, end) in enumerate(bounds(cu_seqlens)):
        steps = [i for i in range(start, end) if mask is None or mask[i]]
        for i in steps:
            x = logp[i].double() - ref_logp[i].double()
            estimate = {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x}[kl]
            per_sequence[s] += estimate
            rewards[i] = -beta * (estimate if kl_clip is None else estimate.clamp(-kl_clip, kl_clip))
        if steps:
            rewards[steps[-1]] += scores[s].double()
    return rewards, per_sequence


def group_advantages(
    scores: Tensor, groups: int | Tensor, *, baseline: str = "mean", scale: str | None = "group_std", eps: float = 1e-6
) -> Tensor:
    """Shao et al. 2024 section 4.1.2; leave-one-out: Ahmadian et al. 2024 eq. 8. Biased standard deviations."""
    scores = scores.double()
    ids = torch.arange(scores.numel()) // groups if isinstance(groups, int) else groups
    out = torch.zeros_like(scores)
    for i in range(scores.numel()):
        peers = scores[ids == ids[i]]
        if peers.numel() == 1:
            continue
        mean = peers.mean()
        if baseline == "leave_one_out":
            mean = (peers.sum() - scores[i]) / (peers.numel() - 1)
        spread = {"group_std": peers, "batch_std": scores}.get(scale or "")
        std = 1.0 if spread is None else spread.std(correction=0) + eps
        out[i] = (scores[i] - mean) / std
    return out
