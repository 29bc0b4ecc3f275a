"""Losses of reward and value models, which never meet the head: float64 loops over groups."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.reference.losses import reduce


def members(groups: int | Tensor, scores: Tensor) -> list[list[int]]:
    """Positions of each group: ``groups`` consecutive ones, or those that share an id."""
    if isinstance(groups, int):
        return [list(range(i, i + groups)) for i in range(0, scores.numel(), groups)]
    ids = groups.tolist()
    return [[i for i, x in enumerate(ids) if x == group] for group in sorted(set(ids))]


def mean_of(terms: list[Tensor], count: float | Tensor | None, scores: Tensor) -> Tensor:
    total = torch.stack(terms).sum() if terms else scores.sum() * 0
    count = len(terms) if count is None else count
    return total / count if count != 0 else total * 0.0


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Half the larger of the clipped and the plain square: OpenAI baselines' ppo2, Huang et al. 2022 detail 9."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    values, returns = values.double().where(mask, 0.0), returns.double().where(mask, 0.0)
    square = (values - returns) ** 2
    if clip is not None:
        assert old_values is not None
        old = old_values.double().where(mask, 0.0)
        square = torch.maximum(square, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    targets = torch.zeros(mask.numel(), dtype=torch.long).where(mask.flatten(), -100)
    return reduce(0.5 * square.flatten(), targets, reduction, num_tokens, num_sequences, cu_seqlens, -100)


def bradley_terry_loss(
    scores: Tensor,
    *,
    ranks: Tensor | None = None,
    groups: int | Tensor = 2,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    num_groups: float | Tensor | None = None,
) -> Tensor:
    """Ouyang et al. 2022 eq. 1 over all pairs of a group; margin: Touvron et al. 2023 (Llama 2) eq. 2;

    centring: Eisenstein et al. 2023, the squared sum of a pair's scores. A lower rank is better.
    """
    scores = scores.double()
    terms = []
    for index, group in enumerate(members(groups, scores)):
        if ranks is None:
            ordered = [(group[0], group[1])]
        else:
            ordered = [(i, j) for i, j in itertools.permutations(group, 2) if ranks[i] < ranks[j]]
        each = []
        for better, worse in ordered:
            x = scores[better] - scores[worse]
            if margin is not None:
                x = x - (margin if not isinstance(margin, Tensor) or margin.ndim == 0 else margin[index])
            loss = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
            each.append(loss + center_coef * (scores[better] + scores[worse]) ** 2)
        if each:
            terms.append(torch.stack(each).mean())
    return mean_of(terms, num_groups, scores)


def plackett_luce_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: int | Tensor,
    *,
    top: int | None = None,
    num_groups: float | Tensor | None = None,
) -> Tensor:
    """Plackett 1975, down to those with fewer than ``top`` better ones.

    Ties after Breslow 1974: each of the tied is chosen from among all of the tied and the worse.
    """
    scores = scores.double()
    terms = []
    for group in members(groups, scores):
        if len(group) < 2:
            continue  # nothing to choose
        stages = []
        for i in group:
            better = [j for j in group if ranks[j] < ranks[i]]
            if top is not None and len(better) >= top:
                continue
            remaining = [j for j in group if ranks[j] >= ranks[i]]
            stages.append(torch.logsumexp(scores[remaining], 0) - scores[i])
        terms.append(torch.stack(stages).sum())
    return mean_of(terms, num_groups, scores)


def infonce_loss(
    scores: Tensor,
    positive: Tensor,
    groups: int | Tensor,
    *,
    temperature: float = 1.0,
    num_groups: float | Tensor | None = None,
) -> Tensor:
    """van den Oord et al. 2018 eq. 4; several positives: the mean over them, Khosla et al. 2020 eq. 2."""
    scores = scores.double() / temperature
    terms = []
    for group in members(groups, scores):
        right = [i for i in group if positive[i]]
        if 0 < len(right) < len(group):
            terms.append(torch.logsumexp(scores[group], 0) - scores[right].mean())
    return mean_of(terms, num_groups, scores)
