"""Losses over sequences and pairs of sequences from their papers, over materialised logits.

Sequences 2i and 2i + 1 are the chosen and the rejected answer of pair i. ``ref_logp`` is [N], or [S] already summed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.reference.head import token_stats
from rlhf_kernels.reference.losses import kept_per_sequence


def sequence_sums(hidden, weight, targets, cu_seqlens, ref_logp, ignore_index, head) -> tuple[Tensor, Tensor, Tensor]:
    """Summed log-probabilities of policy and reference, and the number of kept tokens, each [S]."""
    logp = token_stats(hidden, weight, targets, ignore_index=ignore_index, **head).logp.flatten()
    rows = kept_per_sequence(targets.flatten(), cu_seqlens, ignore_index)
    lengths = torch.tensor([len(r) for r in rows], dtype=logp.dtype)
    policy = torch.stack([logp[r].sum() for r in rows])
    reference = torch.zeros_like(policy)
    if ref_logp is not None:
        ref = ref_logp.flatten().to(logp.dtype)
        per_token = ref.numel() == targets.numel()
        reference = torch.stack([ref[r].sum() for r in rows]) if per_token else ref
    return policy, reference, lengths


def over_pairs(per_pair: Tensor, lengths: Tensor, num_pairs: float | Tensor | None) -> Tensor:
    """A pair counts if both of its sequences have a token that counts."""
    living = (lengths[0::2] > 0) & (lengths[1::2] > 0)
    count = num_pairs if num_pairs is not None else int(living.sum())
    total = per_pair[living].sum()
    return total / count if count != 0 else total * 0.0


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[0::2], x[1::2]


def dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    *,
    beta: float = 0.1,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    margin: float | Tensor | None = None,
    sft_coef: float = 0.0,
    num_pairs: float | Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Rafailov et al. 2023 eq. 7; smoothing: Mitchell 2023 (cDPO) eq. 3; hinge: Zhao et al. 2023 (SLiC);

    margin: Amini et al. 2024 (ODPO) eq. 7; sft term: Pang et al. 2024 eq. 2, length-normalised on the chosen.
    """
    policy, reference, lengths = sequence_sums(hidden, weight, targets, cu_seqlens, ref_logp, ignore_index, head)
    count = lengths.clamp(min=1)
    chosen, rejected = pairs((policy - reference) / (count if length_normalize else 1))
    x = beta * (chosen - rejected)
    if margin is not None:
        x = x - (margin.to(x.dtype) if isinstance(margin, Tensor) else margin)
    right, wrong = (-F.logsigmoid(x), -F.logsigmoid(-x)) if loss == "sigmoid" else (F.relu(1 - x), F.relu(1 + x))
    per_pair = (1 - label_smoothing) * right + label_smoothing * wrong
    nll = -pairs(policy / count)[0]
    return over_pairs(per_pair + sft_coef * nll, lengths, num_pairs)


def ipo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    *,
    beta: float = 0.1,
    length_normalize: bool = True,
    num_pairs: float | Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Azar et al. 2023 eq. 17, squared distance of the log-ratio gap from 1 / (2 beta)."""
    policy, reference, lengths = sequence_sums(hidden, weight, targets, cu_seqlens, ref_logp, ignore_index, head)
    chosen, rejected = pairs((policy - reference) / (lengths.clamp(min=1) if length_normalize else 1))
    return over_pairs((chosen - rejected - 1 / (2 * beta)) ** 2, lengths, num_pairs)


def kto_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: float | Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_sequences: float | Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Ethayarajh et al. 2024 eq. 8."""
    policy, reference, lengths = sequence_sums(hidden, weight, targets, cu_seqlens, ref_logp, ignore_index, head)
    baseline = torch.as_tensor(kl, dtype=policy.dtype).detach().clamp(min=0)
    reward = policy - reference
    good = desirable_weight * (1 - torch.sigmoid(beta * (reward - baseline)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (baseline - reward)))
    living = lengths > 0
    count = num_sequences if num_sequences is not None else int(living.sum())
    total = torch.where(desirable.bool(), good, bad)[living].sum()
    return total / count if count != 0 else total * 0.0


def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 0.1,
    num_pairs: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Hong et al. 2024 eq. 6: cross entropy of the chosen tokens plus beta times the log odds ratio term."""
    policy, _, lengths = sequence_sums(hidden, weight, targets, cu_seqlens, None, ignore_index, head)
    mean = policy / lengths.clamp(min=1)
    log_odds = mean - torch.log1p(-mean.where(lengths > 0, -1.0).exp())
    chosen, rejected = pairs(log_odds)
    odds_ratio = over_pairs(-F.logsigmoid(chosen - rejected), lengths, num_pairs)
    nll = -pairs(policy)[0].sum()
    denominator = num_tokens if num_tokens is not None else float(pairs(lengths)[0].sum())
    return (nll / denominator if denominator != 0 else nll * 0.0) + beta * odds_ratio


def simpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 2.0,
    margin: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
    num_pairs: float | Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Meng et al. 2024 eq. 6; smoothing and sft term as in ``dpo_loss``."""
    policy, _, lengths = sequence_sums(hidden, weight, targets, cu_seqlens, None, ignore_index, head)
    chosen, rejected = pairs(policy / lengths.clamp(min=1))
    x = beta * (chosen - rejected) - (margin.to(chosen.dtype) if isinstance(margin, Tensor) else margin)
    per_pair = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
    return over_pairs(per_pair - sft_coef * chosen, lengths, num_pairs)
