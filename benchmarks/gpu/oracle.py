"""What the kernels are held to: definitions in plain torch, token by token where that is plainer.

``kind`` is the dtype that everything is computed in: float64 is the truth; the dtype of the inputs is what plain torch
makes of them, with logits in that dtype and their softmax in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    mean_logit: Tensor
    top1: Tensor


def logits_of(hidden: Tensor, weight: Tensor, kind: torch.dtype, **head: Any) -> Tensor:
    """softcap(hidden @ weight.T + bias) / temperature, at least float32."""
    z = hidden.to(kind) @ weight.to(kind).T
    if head.get("bias") is not None:
        z = z + head["bias"].to(kind)
    z = z.to(torch.promote_types(kind, torch.float32))
    if head.get("softcap") is not None:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    temperature = head.get("temperature", 1.0)
    return z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)


def stats_of(z: Tensor, targets: Tensor) -> Stats:
    """Zero where the target is -100."""
    kept = targets >= 0
    own = z.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    lse = torch.logsumexp(z, 1)
    logp = z - lse[:, None]
    every = own - lse, -(logp.exp() * logp).sum(1), lse, z.mean(1), (own >= z.max(1).values).to(z.dtype)
    return Stats(*(x.where(kept, 0.0) for x in every))


def divergence(z: Tensor, z_ref: Tensor, targets: Tensor, direction: str) -> Tensor:
    """Exact KL of each row; "reverse" is that of the policy from the reference."""
    p, q = z.log_softmax(1), z_ref.log_softmax(1)
    if direction == "forward":
        p, q = q, p
    return (p.exp() * (p - q)).sum(1).where(targets >= 0, 0.0)


def ppo(stats: Stats, targets: Tensor, old: Tensor, advantages: Tensor, entropy_coef: float) -> Tensor:
    """Clipped at 0.2 both ways, mean over the rows that count."""
    kept, a = targets >= 0, advantages.to(stats.logp.dtype)
    ratio = (stats.logp - old.to(stats.logp.dtype)).where(kept, 0.0).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return -(surrogate + entropy_coef * stats.entropy).where(kept, 0.0).sum() / kept.sum()


def advantages_of(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float,
    whiten_eps: float | None, kind: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns, from the last token of each sequence back; rows that do not count are passed over."""
    r, v, b = (x.cpu().to(kind) for x in (rewards, values, bootstrap))
    kept, starts = mask.tolist(), cu_seqlens.tolist()
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for s in range(len(starts) - 1):
        following, next_value = torch.zeros((), dtype=kind), b[s]
        for t in reversed(range(starts[s], starts[s + 1])):
            if kept[t]:
                following = r[t] + gamma * next_value - v[t] + gamma * lam * following
                next_value = v[t]
                advantages[t], returns[t] = following, following + v[t]
    if whiten_eps is not None:
        rows = mask.cpu()
        mean = advantages[rows].mean()
        scale = ((advantages[rows] - mean) ** 2).mean() + whiten_eps
        advantages = ((advantages - mean) / scale.sqrt()).where(rows, 0.0)
    return advantages, returns


def rewards_of(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, mask: Tensor, beta: float, kl: str,
    kl_clip: float, kind: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The clipped price of KL on each row, the score on the last that counts; and each sequence's KL, unclipped."""
    x = logp.cpu().to(kind) - ref_logp.cpu().to(kind)
    own = {"k1": x, "k2": x * x / 2, "k3": torch.exp(-x) - 1 + x}[kl].where(mask.cpu(), 0.0)
    rewards, starts = -beta * own.clamp(-kl_clip, kl_clip), cu_seqlens.tolist()
    totals = []
    for s, (start, end) in enumerate(pairwise(starts)):
        counting: Sequence[int] = [t for t in range(start, end) if mask[t]]
        if counting:
            rewards[counting[-1]] += scores[s].cpu().to(kind)
        totals.append(own[start:end].sum())
    return rewards.where(mask.cpu(), 0.0), torch.stack(totals)
