"""What preference losses over (chosen, rejected) pairs have in common. Sequences 2i are chosen, 2i + 1 rejected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.checks import cu_seqlens_of, finite, float_tensor, holds, is_finite, is_number, shaped, wanted, wants
from rlhf_kernels.engine import fused_loss
from rlhf_kernels.losses.reduce import Count, denominator, kept_lengths, kept_targets, metric, total
from rlhf_kernels.segments import segment_sum
from rlhf_kernels.types import HeadOptions, LossOutput, TokenStats

SequenceScore = Callable[[Tensor, Tensor], Tensor]  # (summed log-ratio [S], kept tokens [S]) -> implicit reward [S]
Columns = Sequence[Tensor]
PairLoss = Callable[[Tensor], Tensor]  # chosen minus rejected reward, less the margin [P] -> loss [P]


class Anchor(NamedTuple):
    """A negative log-likelihood of the chosen replies beside the preference term."""

    coef: float
    per_token: bool  # mean over all chosen tokens; else over each reply's tokens, then over pairs
    num_tokens: Count | None = None


def log_sigmoid_loss(label_smoothing: float = 0.0) -> PairLoss:
    """-log sigmoid(u), mixed with that of the flipped pair: cross-entropy where labels are wrong at that rate."""
    return _smoothed(lambda u: -F.logsigmoid(u), label_smoothing)


def hinge_loss(label_smoothing: float = 0.0) -> PairLoss:
    """max(0, 1 - u), mixed with that of the flipped pair."""
    return _smoothed(lambda u: F.relu(1 - u), label_smoothing)


def _smoothed(loss: PairLoss, label_smoothing: float) -> PairLoss:
    eps = label_smoothing
    return (lambda u: (1 - eps) * loss(u) + eps * loss(-u)) if eps else loss


def check_label_smoothing(eps: float) -> None:
    wants(is_number(eps) and 0 <= eps <= 0.5, "label_smoothing", eps, "a rate of wrong labels, 0 to 0.5")


def check_coef(name: str, x: float) -> None:
    wants(is_finite(x) and x >= 0, name, x, "a finite number, zero or more")


def reference_columns(
    ref_logp: Tensor | None, targets: Tensor, kept: Tensor, lengths: Tensor, cu_seqlens: Tensor, checks: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``ref_logp`` as the engine takes it: (per token, per sequence). ``lengths`` [S] counts ``kept`` tokens."""
    if ref_logp is None:
        return (), ()
    float_tensor("ref_logp", ref_logp)
    ref_logp = ref_logp.detach()
    if ref_logp.shape == targets.shape:
        wants(ref_logp.device == targets.device, "ref_logp", ref_logp, f"device {targets.device}, where targets is")
        if checks:
            finite(kept, ref_logp=ref_logp)
        return (ref_logp,), ()
    shaped("ref_logp", ref_logp, (cu_seqlens.numel() - 1,), targets.device, "summed per sequence, or that of targets")
    if checks:
        increasing = (cu_seqlens.diff() > 0).all()
        holds(increasing, "cu_seqlens: wants to strictly increase where ref_logp is one per sequence")
        finite(lengths > 0, ref_logp=ref_logp)
    return (), (ref_logp.where(lengths > 0, 0.0),)  # What does not count must not become NaN times zero.


def log_ratio_sums(stats: TokenStats, cu_seqlens: Tensor, per_token: Columns, per_sequence: Columns) -> Tensor:
    """[S] log-ratio of policy to reference (of the policy alone without one), summed over kept tokens."""
    x = stats.logp
    # Token by token where possible: the differences are small where the sums are not.
    sums = segment_sum(x - per_token[0].to(x.dtype) if per_token else x, cu_seqlens)
    return sums - per_sequence[0].to(x.dtype) if per_sequence else sums


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor | None,
    score: SequenceScore,
    pair_loss: PairLoss,
    *,
    margin: float | Tensor | None = None,
    anchor: Anchor | None = None,
    num_pairs: Count | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Mean of ``pair_loss(score(chosen) - score(rejected) - margin)`` over pairs with kept tokens on both sides."""
    kept, checks = kept_targets(hidden, targets, head.get("ignore_index", -100)), wanted(head)
    cu = cu_seqlens_of("cu_seqlens", cu_seqlens, targets.numel(), targets.device, checks)
    sequences = cu.numel() - 1
    wants(sequences % 2 == 0, "cu_seqlens", cu_seqlens, f"pairs (chosen, rejected), not {sequences} sequences")
    lengths = kept_lengths(kept, cu)
    whole = (lengths[0::2] > 0) & (lengths[1::2] > 0)
    per_token, per_sequence = reference_columns(ref_logp, targets, kept, lengths, cu, checks)
    tokens, references = len(per_token), len(per_sequence)
    if isinstance(margin, Tensor):
        float_tensor("margin", margin)
        shaped("margin", margin, (sequences // 2,), targets.device, "one per pair")
        if checks:
            finite(whole, margin=margin)
        each = margin.detach().where(whole, 0.0)
        per_sequence = (*per_sequence, each.repeat_interleave(2, output_size=sequences))
    elif margin is not None:
        wants(is_finite(margin), "margin", margin, "a finite number or one per pair")

    over = denominator("num_pairs", num_pairs, whole.sum, targets.device, checks)
    anchor_over = over
    if anchor is not None and anchor.per_token:
        anchor_over = denominator("num_tokens", anchor.num_tokens, lengths[0::2].sum, targets.device, checks)

    def objective(stats: TokenStats, cu: Tensor | None, *columns: Tensor):
        assert cu is not None
        rest = columns[tokens:]
        length = cu.diff()
        both = (length[0::2] > 0) & (length[1::2] > 0)
        length = length.clamp(min=1).to(stats.logp.dtype)
        sums = log_ratio_sums(stats, cu, columns[:tokens], rest[:references])
        rewards = score(sums, length)
        chosen, rejected = rewards[0::2], rewards[1::2]
        gain = chosen - rejected
        offset = rest[references][0::2].to(gain.dtype) if len(rest) > references else margin or 0.0
        loss = total(pair_loss(gain - offset).where(both, 0.0), over)

        logp = segment_sum(stats.logp, cu) if tokens or references else sums
        metrics = {
            "rewards/chosen": metric(chosen, both),
            "rewards/rejected": metric(rejected, both),
            "margin": metric(gain, both),
            "accuracy": metric(gain > 0, both),
            "logp/chosen": metric(logp[0::2], both),
            "logp/rejected": metric(logp[1::2], both),
        }
        if anchor is not None:
            nll, tokens_chosen = -logp[0::2], cu.diff()[0::2]
            mean = nll / length[0::2]
            loss = loss + anchor.coef * total(nll if anchor.per_token else mean.where(both, 0.0), anchor_over)
            metrics["nll"] = (nll.detach().sum(), tokens_chosen.sum().to(nll.dtype))
        return loss, metrics

    return fused_loss(
        hidden,
        weight,
        targets,
        objective,
        per_token=per_token,
        per_sequence=per_sequence,
        cu_seqlens=cu,
        unit=2,
        **head,
    )


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logp) <= 1; a certain reply (p = 1) has large finite odds and no gradient."""
    mean_logp = mean_logp.clamp(max=-math.sqrt(torch.finfo(mean_logp.dtype).tiny))
    return mean_logp - (-torch.expm1(mean_logp)).log()
