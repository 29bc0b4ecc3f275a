"""Policy-gradient and supervised losses from their papers, over materialised logits.

All of them take ``dtype`` beside the options of the head (``reference/head.py``) and return the scalar loss.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rlhf_kernels.reference.head import Stats, kl_divergence, token_stats


def kept_per_sequence(targets: Tensor, cu_seqlens: Tensor, ignore_index: int) -> list[Tensor]:
    """For each sequence the positions of its tokens that count; empty where none does."""
    bounds = cu_seqlens.tolist()
    return [start + (targets[start:end] != ignore_index).nonzero().flatten() for start, end in pairwise(bounds)]


def reduce(
    per_token: Tensor,
    targets: Tensor,
    reduction: str,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Mean over tokens; or over sequences, of their token means or token sums. What has no kept token is not there."""
    kept = targets != ignore_index
    if reduction == "token_mean":
        total, count = per_token[kept].sum(), num_tokens if num_tokens is not None else int(kept.sum())
    else:
        each = {"sequence_mean": torch.mean, "sequence_sum": torch.sum}[reduction]
        assert cu_seqlens is not None
        living = [rows for rows in kept_per_sequence(targets, cu_seqlens, ignore_index) if len(rows)]
        total = sum((each(per_token[rows]) for rows in living), per_token[kept].sum() * 0)
        count = num_sequences if num_sequences is not None else len(living)
    return total / count if count != 0 else total * 0.0


def like(x: Tensor, stats: Stats) -> Tensor:
    return x.flatten().to(stats.logp.dtype)


def spread(x: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[N] from [N], or from [S]: one value for all tokens of a sequence."""
    x = x.flatten()
    if x.numel() == targets.numel():
        return x
    assert cu_seqlens is not None
    return x.repeat_interleave(cu_seqlens.diff().long())


def kl_estimate(kl: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman 2020, "Approximating KL divergence"; a plus: the value, with k2's unbiased gradient."""
    log_ratio = ref_logp - logp
    k1, k2, k3 = -log_ratio, 0.5 * log_ratio**2, log_ratio.exp() - 1 - log_ratio
    if kl.endswith("+"):
        value = {"k1+": k1, "k3+": k3}[kl]
        return value.detach() + k2 - k2.detach()
    return {"k2": k2, "k3": k3}[kl]


def ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    clip_rule: str = "ppo",
    ratio: str = "token",
    entropy_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    ref: tuple[Tensor, Tensor] | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    token_weight: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Schulman et al. 2017 eq. 7; dual clip: Ye et al. 2020 eq. 5; GSPO: Zheng et al. 2025 eq. 7; CISPO: MiniMax 2025.

    ``token_weight`` multiplies all that a token contributes and does not enter the denominator.
    """
    stats = token_stats(hidden, weight, targets, ignore_index=ignore_index, **head)
    kept = targets.flatten() != ignore_index
    stats = Stats(*(x.flatten() for x in stats))
    silent = torch.zeros((), dtype=stats.logp.dtype)

    logp = stats.logp
    log_ratio = logp - (logp.detach() if old_logp is None else like(old_logp, stats).where(kept, silent))
    advantages = like(spread(advantages, targets, cu_seqlens), stats).where(kept, silent)
    if ratio == "sequence":
        assert cu_seqlens is not None
        pooled = torch.zeros_like(log_ratio)
        for rows in kept_per_sequence(targets.flatten(), cu_seqlens, ignore_index):
            if len(rows):
                mean = log_ratio[rows].mean()
                # GSPO-token, eq. 13-14: the value of the sequence's ratio, the gradient of the token's own
                pooled = pooled.index_add(0, rows, mean.detach() + logp[rows] - logp[rows].detach())
        log_ratio = pooled
    r = log_ratio.exp()
    low, high = 1 - clip[0], 1 + clip[1]

    if clip_rule == "cispo":
        policy = -r.detach().clamp(low, high) * advantages * logp
    else:
        objective = torch.minimum(r * advantages, r.clamp(low, high) * advantages)
        if dual_clip is not None:
            objective = torch.maximum(objective, dual_clip * advantages).where(advantages < 0, objective)
        policy = -objective

    loss = policy - entropy_coef * stats.entropy
    if kl_coef != 0 and kl == "exact":
        assert ref is not None
        exact = kl_divergence(hidden, weight, *ref, targets, ignore_index=ignore_index, **head)
        loss = loss + kl_coef * exact.flatten()
    elif kl_coef != 0:
        assert ref_logp is not None
        loss = loss + kl_coef * kl_estimate(kl, logp, like(ref_logp, stats).where(kept, silent))
    if token_weight is not None:
        loss = loss * like(token_weight, stats).where(kept, silent)
    return reduce(loss, targets.flatten(), reduction, num_tokens, num_sequences, cu_seqlens, ignore_index)


grpo_loss = ppo_loss
"""Shao et al. 2024 eq. 3 is the same per-token loss; what differs (group advantages, k3) are the caller's arguments."""


def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Cross entropy; label smoothing: Szegedy et al. 2016 eq. 7; z-loss: Chowdhery et al. 2022 section 5."""
    stats = token_stats(hidden, weight, targets, ignore_index=ignore_index, **head)
    stats = Stats(*(x.flatten() for x in stats))
    kept = targets.flatten() != ignore_index
    uniform = stats.lse - stats.mean_logit  # cross entropy against the uniform distribution
    loss = -(1 - label_smoothing) * stats.logp + z_loss * stats.lse**2
    if label_smoothing:
        loss = loss + label_smoothing * uniform
    if token_weight is not None:
        loss = loss * like(token_weight, stats).where(kept, 0.0)
    return reduce(loss, targets.flatten(), reduction, num_tokens, num_sequences, cu_seqlens, ignore_index)
