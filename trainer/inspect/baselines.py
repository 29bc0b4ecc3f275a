"""What a reward model has to beat: the longer reply, and a bag of words."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainer.base.statistics import Estimate

WORD = re.compile(r"\w+|[^\w\s]")
FOLDS = 5
STEPS = 100  # Two real files took 17 to 23.
MAX_PAIRS = 20_000


class Pair(NamedTuple):
    """Two replies to one prompt, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks.

    >>> words("It's 4!")
    ['it', "'", 's', '4', '!']
    """
    return WORD.findall(text.lower())


def length_baseline(pairs: Sequence[Pair]) -> Estimate:
    """Pair accuracy of "the longer reply is better", in words; equal lengths count half.

    Args:
        pairs: At least one.

    Returns:
        With a 95 % interval; below one half means that shorter replies win.
    """
    right = [_half(len(p.chosen.split()), len(p.rejected.split())) for p in pairs]
    return share_over_prompts(right, [p.prompt for p in pairs])


def bag_of_words(pairs: Sequence[Pair], *, penalty: float = 0.01, seed: int = 0) -> Estimate:
    """Held-out pair accuracy of a Bradley-Terry model whose score is a sum of weights of words.

    Bradley and Terry 1952; a word counts log(1 + occurrences). Five folds, each scored by a model that has seen none
    of its prompts, so that every pair is held out once.

    Args:
        pairs: Pairs of at least five prompts; beyond 20,000 a random sample of them.
        penalty: Of the squared weights, per pair; the mean loss of a pair is about 0.7 before training.
        seed: Of the folds and the sample.

    Returns:
        With a 95 % interval from a bootstrap over prompts.

    Raises:
        ValueError: There are fewer than five prompts.
    """
    source = random.Random(seed)
    if len(pairs) > MAX_PAIRS:
        pairs = source.sample(pairs, MAX_PAIRS)
    prompts = sorted({p.prompt for p in pairs})
    if len(prompts) < FOLDS:
        raise ValueError(f"pairs: got {len(prompts)} different prompts, want at least {FOLDS}")
    source.shuffle(prompts)
    fold = {prompt: i % FOLDS for i, prompt in enumerate(prompts)}
    counted = [(Counter(words(p.chosen)), Counter(words(p.rejected))) for p in pairs]
    margins = torch.zeros(len(pairs))
    for held_out in range(FOLDS):
        train = [i for i, p in enumerate(pairs) if fold[p.prompt] != held_out]
        test = [i for i, p in enumerate(pairs) if fold[p.prompt] == held_out]
        seen = Counter(word for i in train for reply in counted[i] for word in reply)
        often = sorted(word for word, replies in seen.items() if replies > 1)  # The others cannot generalise.
        vocabulary = {word: i for i, word in enumerate(often)}
        weights = _fit(_differences([counted[i] for i in train], vocabulary), penalty)
        margins[test] = _differences([counted[i] for i in test], vocabulary) @ weights
    return share_over_prompts([_half(m, 0.0) for m in margins.tolist()], [p.prompt for p in pairs])


def _differences(counted: Sequence[tuple[Counter[str], Counter[str]]], vocabulary: dict[str, int]) -> Tensor:
    """Log counts of the chosen reply minus those of the rejected one, sparse [pairs, words]."""
    row, column, value = [], [], []
    for at, (chosen, rejected) in enumerate(counted):
        found = sorted((vocabulary[word], word) for word in chosen.keys() | rejected.keys() if word in vocabulary)
        row += [at] * len(found)
        column += [place for place, _ in found]
        value += [math.log1p(chosen[word]) - math.log1p(rejected[word]) for _, word in found]
    places, shape = torch.tensor([row, column], dtype=torch.int64), (len(counted), max(len(vocabulary), 1))
    return torch.sparse_coo_tensor(places, torch.tensor(value), shape, check_invariants=True, is_coalesced=True)


def _fit(x: Tensor, penalty: float) -> Tensor:
    """Weights [words] of the least penalised logistic loss of ``x @ weights``."""
    weights = torch.zeros(x.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        weights.grad = None
        value = softplus(-(x @ weights)).mean() + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    search.step(loss)  # type: ignore[arg-type]
    return weights.detach()


def _half(mine: float, theirs: float) -> float:
    return 0.5 if mine == theirs else float(mine > theirs)


def share_over_prompts(values: Sequence[float], prompts: Sequence[str]) -> Estimate:
    """Mean over pairs, with a percentile bootstrap over prompts: pairs of one prompt are no independent evidence.

    Args:
        values: One per pair.
        prompts: The prompt of each.
    """
    sums: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        mine = sums.setdefault(prompt, [0.0, 0.0])
        mine[0] += value
        mine[1] += 1
    parts = torch.tensor(list(sums.values()), dtype=torch.float64)
    value = float(parts[:, 0].sum() / parts[:, 1].sum())
    source = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(max(200, min(1000, 5_000_000 // len(parts)))):
        drawn = parts[torch.randint(len(parts), (len(parts),), generator=source)].sum(0)
        draws.append(float(drawn[0] / drawn[1]))
    low, high = torch.quantile(torch.tensor(draws), torch.tensor([0.025, 0.975])).tolist()
    return Estimate(value, min(low, value), max(high, value))
