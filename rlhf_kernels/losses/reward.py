"""Losses of reward models over groups of scored replies. Scores come from a scalar head: no GEMM here.

Legend: S replies, G groups, K members of the largest group; [G, K, K] holds (i, j) pairs within a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.checks import (
    FLOATS,
    bool_tensor,
    finite,
    flags,
    float_tensor,
    holds,
    is_count,
    is_finite,
    shaped,
    wants,
)
from rlhf_kernels.checks import positive as check_positive
from rlhf_kernels.engine import compilable_loss
from rlhf_kernels.losses.pairs import check_coef, check_label_smoothing, log_sigmoid_loss
from rlhf_kernels.losses.reduce import Count, averages, denominator, metric, total
from rlhf_kernels.segments import INTEGERS, Groups, group_layout
from rlhf_kernels.types import LossOutput


@compilable_loss("accuracy", "margin", "rewards/chosen", "rewards/rejected")
def bradley_terry_loss(
    scores: Tensor,
    *,
    ranks: Tensor | None = None,
    groups: int | Tensor = 2,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    num_groups: Count | None = None,
    checks: bool = True,
) -> LossOutput:
    """Pairwise reward-model loss; with ranks, all pairs of a group.

    ``-log sigmoid(better - worse - margin)`` (https://arxiv.org/abs/2203.02155, Eq. 1; the margin is that of
    https://arxiv.org/abs/2307.09288, Eq. 2), averaged over a group's pairs, so that a prompt counts once however many
    replies it has, then over groups. Equal ranks make no pair; groups without a pair count nowhere.

    Args:
        scores: [S] rewards, any float dtype; computed in float32 (float64 for float64).
        ranks: [S], smaller is better, equal is a tie; only their order within a group matters. None: replies are
            interleaved pairs, 2i chosen, 2i + 1 rejected.
        groups: K for consecutive groups of K, or [S] integer ids.
        margin: how much better the better reply should score; a number, or [S/2] with ``ranks=None``.
        center_coef: weight of (better + worse)^2, which pins the free constant of rewards
            (https://arxiv.org/abs/2312.09244, Eq. 2).
        label_smoothing: rate of wrong labels, 0 to 0.5; mixes in the loss of the flipped pair.
        num_groups: global denominator; the groups here that have a pair if None.
        checks: look into the data: nothing NaN or infinite in a group that counts.

    Returns:
        The loss, and averages over pairs, then groups: ``accuracy``, ``margin`` (better less worse),
        ``rewards/chosen``, ``rewards/rejected``.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: an odd number of scores without ranks, or a wrong shape, dtype or range.

    >>> rk.bradley_terry_loss(torch.tensor([2.0, 2.0])).loss  # log 2
    tensor(0.6931)
    >>> rk.bradley_terry_loss(torch.tensor([500.0, -500.0, 0.0]), ranks=torch.tensor([3, 1, 2]), groups=3).loss
    tensor(666.6667)
    """
    layout = _layout(scores, groups, checks)
    check_coef("center_coef", center_coef)
    check_label_smoothing(label_smoothing)
    offset: Tensor | float = 0.0
    if isinstance(margin, Tensor):
        float_tensor("margin", margin)
        wants(ranks is None, "margin", margin, "a number where ranks are given")
        shaped("margin", margin, (scores.numel() // 2,), scores.device, "one per pair")
        if checks:
            finite(margin=margin)
        offset = margin.detach().to(torch.promote_types(scores.dtype, torch.float32))[:, None, None]
    elif margin is not None:
        wants(is_finite(margin), "margin", margin, "a finite number or one per pair")
        offset = margin
    if ranks is None:
        wants(isinstance(groups, int) and groups == 2, "groups", groups, "2 where ranks is None")
        order = torch.arange(2, device=scores.device).expand(layout.index.shape)
    else:
        order = _ranks(ranks, scores, layout, checks)

    pair = (order[:, :, None] < order[:, None, :]) & layout.member[:, :, None] & layout.member[:, None, :]
    pairs = pair.sum((1, 2))
    alive = pairs > 0
    s = _scores(scores, layout, alive, checks)
    better, worse = s[:, :, None], s[:, None, :]
    gain = (better - worse).where(pair, 0.0)
    loss = log_sigmoid_loss(label_smoothing)(gain - offset)
    if center_coef:
        loss = loss + center_coef * (better + worse).square()

    def mean_of_pairs(x: Tensor) -> Tensor:
        return x.where(pair, 0.0).sum((1, 2)) / pairs.clamp(min=1)

    metrics = {
        "accuracy": mean_of_pairs((gain > 0).to(s.dtype)),
        "margin": mean_of_pairs(gain),
        "rewards/chosen": mean_of_pairs(better.expand_as(gain)),
        "rewards/rejected": mean_of_pairs(worse.expand_as(gain)),
    }
    return _group_mean(mean_of_pairs(loss), alive, num_groups, metrics, checks)


@compilable_loss("accuracy")
def plackett_luce_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: int | Tensor,
    *,
    top: int | None = None,
    num_groups: Count | None = None,
    checks: bool = True,
) -> LossOutput:
    """Negative log-likelihood of whole rankings, drawn best first without replacement.

    Plackett 1975, https://doi.org/10.2307/2346567; as a loss ListMLE, https://doi.org/10.1145/1390156.1390306.
    Each reply is chosen from those ranked no better; tied replies are each chosen from the same set, ties included
    (Breslow 1974, https://doi.org/10.2307/2529620). Summed over a group's choices, averaged over groups of two or more.

    Args:
        scores: [S] rewards, any float dtype; computed in float32 (float64 for float64).
        ranks: [S], smaller is better, equal is a tie; only their order within a group matters.
        groups: K for consecutive groups of K, or [S] integer ids.
        top: count only replies with fewer than ``top`` better ones, where the tail's order means little. None: all.
        num_groups: global denominator; the groups here with two members or more if None.
        checks: look into the data: nothing NaN or infinite in a group that counts.

    Returns:
        The loss, and ``accuracy``: how often a best-ranked reply has the group's highest score.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a wrong shape, dtype or range.

    >>> rk.plackett_luce_loss(torch.zeros(3), torch.tensor([1, 2, 3]), 3).loss  # log 3!
    tensor(1.7918)
    """
    layout = _layout(scores, groups, checks)
    order = _ranks(ranks, scores, layout, checks)
    wants(top is None or is_count(top), "top", top, "a positive whole number, or None")
    member = layout.member
    alive = member.sum(1) > 1
    s = _scores(scores, layout, alive, checks)
    itself = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    rival = member[:, None, :] & (order[:, None, :] >= order[:, :, None])
    better = (member[:, None, :] & (order[:, None, :] < order[:, :, None])).sum(2)
    # A padded row keeps itself as a rival: the log-sum-exp of nothing has no gradient.
    lse = s[:, None, :].masked_fill(~(rival | itself), -math.inf).logsumexp(2)
    counts = member if top is None else member & (better < top)
    loss = (lse - s).where(counts, 0.0).sum(1)
    hit = _top_hit(s, member & (better == 0), member)
    return _group_mean(loss, alive, num_groups, {"accuracy": hit}, checks)


@compilable_loss("accuracy")
def infonce_loss(
    scores: Tensor,
    positive: Tensor,
    groups: int | Tensor,
    *,
    temperature: float = 1.0,
    num_groups: Count | None = None,
    checks: bool = True,
) -> LossOutput:
    """Cross-entropy of the positive reply against its whole group (InfoNCE, https://arxiv.org/abs/1807.03748, Eq. 4).

    Several positives in a group: the mean of their losses (https://arxiv.org/abs/2004.11362, Eq. 2). Groups without a
    positive, or with nothing else, count nowhere.

    Args:
        scores: [S] rewards, any float dtype; computed in float32 (float64 for float64).
        positive: [S] bool.
        groups: K for consecutive groups of K, or [S] integer ids.
        temperature: scores are divided by it, positive.
        num_groups: global denominator; the groups here with a positive and a negative if None.
        checks: look into the data: nothing NaN or infinite in a group that counts.

    Returns:
        The loss, and ``accuracy``: how often a positive has the group's highest score.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a wrong shape, dtype or range.

    >>> rk.infonce_loss(torch.zeros(4), torch.tensor([True, False, False, False]), 4).loss  # log 4
    tensor(1.3863)
    """
    layout = _layout(scores, groups, checks)
    check_positive("temperature", temperature)
    bool_tensor("positive", positive, tuple(scores.shape), scores.device, "that of scores")
    member = layout.member
    good = layout.gather(positive) & member
    count = good.sum(1)
    alive = (count > 0) & (member & ~good).any(1)
    s = _scores(scores, layout, alive, checks)
    log_p = (s / temperature).masked_fill(~member, -math.inf).log_softmax(1)
    loss = -log_p.where(good, 0.0).sum(1) / count.clamp(min=1)
    return _group_mean(loss, alive, num_groups, {"accuracy": _top_hit(s, good, member)}, checks)


def _layout(scores: Tensor, groups: int | Tensor, checks: bool) -> Groups:
    flags(checks=checks)
    float_tensor("scores", scores, 1)
    return group_layout(groups, scores)


def _scores(scores: Tensor, layout: Groups, alive: Tensor, checks: bool) -> Tensor:
    """[G, K] in at least float32; zero in groups that count nowhere, whatever stands there."""
    counts = alive[:, None].expand(layout.index.shape)
    if checks:
        finite(lambda: layout.scatter(counts, scores.numel()), scores=scores)
    return layout.gather(scores.to(torch.promote_types(scores.dtype, torch.float32))).where(counts, 0.0)


def _ranks(ranks: Tensor, scores: Tensor, layout: Groups, checks: bool) -> Tensor:
    shaped("ranks", ranks, tuple(scores.shape), scores.device, "that of scores")
    wants(ranks.dtype in (*FLOATS, *INTEGERS), "ranks", ranks, "whole numbers or floats")
    if checks:
        holds(~torch.isnan(ranks).any(), "ranks: got NaN, wants what can be put in order")
    return layout.gather(ranks.detach())


def _top_hit(s: Tensor, good: Tensor, member: Tensor) -> Tensor:
    """[G] one where a good member's score is the highest of its group."""
    best = s.detach().masked_fill(~member, -math.inf)
    return ((best == best.amax(1, keepdim=True)) & good).any(1).to(s.dtype)


def _group_mean(
    loss: Tensor, alive: Tensor, num_groups: Count | None, metrics: dict[str, Tensor], checks: bool
) -> LossOutput:
    over = denominator("num_groups", num_groups, alive.sum, loss.device, checks)
    logged = averages({name: metric(x, alive) for name, x in metrics.items()})
    return LossOutput(total(loss.where(alive, 0.0), over), logged)
