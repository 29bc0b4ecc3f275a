"""Supervised fine-tuning: cross-entropy with label smoothing, z-loss and token weights."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from rlhf_kernels.checks import finite, float_tensor, is_number, shaped, wanted, wants
from rlhf_kernels.engine import compilable_loss, fused_loss
from rlhf_kernels.losses.pairs import check_coef
from rlhf_kernels.losses.reduce import Count, kept_targets, metric, token_reduction, total
from rlhf_kernels.types import HeadOptions, LossOutput, TokenStats


@compilable_loss("nll", "entropy", "accuracy")
def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    cu_seqlens: Tensor | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Negative log-likelihood of the targets, straight from hidden states.

    Per kept token ``token_weight * (-(1 - eps) logp - eps mean_v log p_v + z_loss * lse^2)``: label smoothing over the
    whole vocabulary (https://arxiv.org/abs/1512.00567, section 7) and the z-loss that keeps logits from drifting
    (https://arxiv.org/abs/2204.02311, section 5).

    Cost: three GEMMs, no recomputation; tokens with weight zero skip the last two.

    Args:
        hidden: [..., H] last hidden states, aligned with ``targets``; float32, bfloat16, float16 or float64.
        weight: [V, H] language-model head, dtype of ``hidden``.
        targets: [...] next tokens, int64 or int32; ``ignore_index`` marks what is not to be learned.
        label_smoothing: eps, 0 to 1.
        z_loss: weight of the squared log-sum-exp.
        token_weight: [...] factor of each token's loss; it does not enter the denominator.
        reduction: "token_mean", "sequence_mean" (tokens, then sequences) or "sequence_sum" (sum, then mean).
        num_tokens: global denominator of ``token_mean``; the kept tokens of this call if None.
        num_sequences: global denominator of the other two; the sequences here that have a kept token if None.
        cu_seqlens: [S+1] boundaries, for the reductions over sequences.
        **head: see ``HeadOptions``.

    Returns:
        The loss, and means over kept tokens: ``nll`` (neither weighted nor smoothed), ``entropy``, ``accuracy`` (the
        target has the largest logit). All masked: zero, with zero gradient.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a wrong shape, dtype or device, or an option out of range.

    >>> h, w = torch.zeros(3, 8), torch.zeros(4, 8)
    >>> rk.sft_loss(h, w, torch.tensor([1, 2, -100])).loss  # uniform over 4 tokens: log 4
    tensor(1.3863)
    """
    smooth = is_number(label_smoothing) and 0 <= label_smoothing <= 1
    wants(smooth, "label_smoothing", label_smoothing, "a number from 0 to 1")
    check_coef("z_loss", z_loss)
    kept, checks = kept_targets(hidden, targets, head.get("ignore_index", -100)), wanted(head)
    mean, over = token_reduction(reduction, kept, cu_seqlens, num_tokens, num_sequences, checks)
    weights = [] if mean is None else [mean]
    if token_weight is not None:
        float_tensor("token_weight", token_weight)
        shaped("token_weight", token_weight, tuple(targets.shape), targets.device, "that of targets")
        if checks:
            finite(kept, token_weight=token_weight)
        weights.append(token_weight.detach())

    def objective(stats: TokenStats, cu_seqlens: Tensor | None, *weights: Tensor):
        loss = -stats.logp
        metrics = {"nll": metric(loss), "entropy": metric(stats.entropy)}
        if stats.top1 is not None:
            metrics["accuracy"] = metric(stats.top1)
        if label_smoothing:
            assert stats.mean_logit is not None
            loss = (1 - label_smoothing) * loss + label_smoothing * (stats.lse - stats.mean_logit)
        if z_loss:
            loss = loss + z_loss * stats.lse.square()
        for factor in weights:
            loss = factor.to(loss.dtype) * loss
        return total(loss, over), metrics

    return fused_loss(hidden, weight, targets, objective, per_token=weights, **head)
