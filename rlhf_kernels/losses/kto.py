"""Kahneman-Tversky optimisation, https://arxiv.org/abs/2402.01306: single replies marked desirable or not."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from rlhf_kernels.checks import bool_tensor, cu_seqlens_of, finite, float_tensor, is_finite, positive, wanted, wants
from rlhf_kernels.engine import compilable_loss, fused_loss
from rlhf_kernels.losses.pairs import check_coef, log_ratio_sums, reference_columns
from rlhf_kernels.losses.reduce import Count, denominator, kept_lengths, kept_targets, metric, total
from rlhf_kernels.types import HeadOptions, LossOutput, TokenStats


@compilable_loss("rewards/chosen", "rewards/rejected", "kl")
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
    num_sequences: Count | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Mean of ``lambda - v`` over replies (KTO, Eq. 8).

    With r the summed log-ratio of policy to reference, ``lambda_D (1 - sigmoid(beta (r - kl)))`` for desirable replies
    and ``lambda_U (1 - sigmoid(beta (kl - r)))`` for the others.

    Cost: three GEMMs, no recomputation, as long as a sequence fits the byte budget.

    Args:
        hidden: [..., H] last hidden states, aligned with ``targets``.
        weight: [V, H] language-model head, dtype of ``hidden``.
        targets: [...] tokens of the replies; ``ignore_index`` marks prompt and padding.
        cu_seqlens: [S+1] boundaries of the rows given, ignored ones included.
        ref_logp: [...] log-probabilities in nats under the reference, or [S] summed over each reply's kept tokens;
            then ``cu_seqlens`` strictly increases.
        desirable: [S] bool.
        kl: the reference point in nats: the mean over the global batch of the summed log-ratios of *mismatched* prompts
            and replies. A number or a 0-d tensor; no gradient flows through it, and below zero it counts as zero.
        beta: strength of the pull to the reference, positive.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
        num_sequences: global denominator; the sequences here with a kept token if None.
        **head: see ``HeadOptions``.

    Returns:
        The loss, ``rewards/chosen`` and ``rewards/rejected`` (beta times the log-ratios, means over desirable and
        undesirable replies) and ``kl``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape, dtype or device; ``beta`` not positive; a negative weight.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> ref_logp = rk.token_stats(h, w, y).logp
    >>> rk.kto_loss(h, w, y, torch.tensor([0, 2, 5]), ref_logp, torch.tensor([True, False]), 0.0).loss
    tensor(0.5000)
    """
    positive("beta", beta)
    check_coef("desirable_weight", desirable_weight)
    check_coef("undesirable_weight", undesirable_weight)
    kept, checks = kept_targets(hidden, targets, head.get("ignore_index", -100)), wanted(head)
    cu = cu_seqlens_of("cu_seqlens", cu_seqlens, targets.numel(), targets.device, checks)
    bool_tensor("desirable", desirable, (cu.numel() - 1,), targets.device, "one per sequence")
    if isinstance(kl, Tensor):
        float_tensor("kl", kl)
        wants(kl.dim() == 0, "kl", kl, "a number or a 0-d float tensor")
        baseline = kl.detach().to(targets.device)
        if checks:
            finite(kl=baseline)
    else:
        wants(is_finite(kl), "kl", kl, "a finite number or a 0-d float tensor")
        baseline = torch.full((), kl, dtype=torch.float64, device=targets.device)
    baseline = baseline.clamp(min=0)
    float_tensor("ref_logp", ref_logp)
    lengths = kept_lengths(kept, cu)
    per_token, per_sequence = reference_columns(ref_logp, targets, kept, lengths, cu, checks)
    tokens = len(per_token)
    over = denominator("num_sequences", num_sequences, (lengths > 0).sum, targets.device, checks)

    def objective(stats: TokenStats, cu: Tensor | None, *columns: Tensor):
        assert cu is not None
        *reference, good = columns[tokens:]
        alive = cu.diff() > 0
        rewards = beta * log_ratio_sums(stats, cu, columns[:tokens], reference)
        gain = rewards - beta * baseline.to(rewards.dtype)
        # 1 - sigmoid(u) as sigmoid(-u): small values keep their digits.
        loss = torch.where(
            good, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
        ).where(alive, 0.0)
        metrics = {
            "rewards/chosen": metric(rewards, alive & good),
            "rewards/rejected": metric(rewards, alive & ~good),
            "kl": metric(baseline.to(rewards.dtype).expand_as(rewards), alive),
        }
        return total(loss, over), metrics

    return fused_loss(
        hidden,
        weight,
        targets,
        objective,
        per_token=per_token,
        per_sequence=(*per_sequence, desirable),
        cu_seqlens=cu,
        **head,
    )
