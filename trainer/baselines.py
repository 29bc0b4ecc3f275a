"""What a reward model has to beat: the longer reply, and a bag of words."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.evaluate import Estimate

WORD = re.compile(r"\w+|[^\w\s]")
FOLDS = 5
STEPS = 200
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
    counted = [Counter(words(p.chosen)) for p in pairs], [Counter(words(p.rejected)) for p in pairs]
    margins = torch.zeros(len(pairs))
    for held_out in range(FOLDS):
        train = [i for i, p in enumerate(pairs) if fold[p.prompt] != held_out]
        test = [i for i, p in enumerate(pairs) if fold[p.prompt] == held_out]
        vocabulary = _vocabulary([counted[side][i] for i in train for side in (0, 1)])
        weights = _fit(_difference(counted, train, vocabulary), penalty)
        margins[test] = _difference(counted, test, vocabulary).times(weights)
    return share_over_prompts([_half(m, 0.0) for m in margins.tolist()], [p.prompt for p in pairs])


def _vocabulary(texts: Sequence[Counter[str]]) -> dict[str, int]:
    """Words of at least two replies; the others cannot generalise."""
    seen = Counter(word for text in texts for word in text)
    return {word: i for i, word in enumerate(sorted(w for w, n in seen.items() if n > 1))}


class Rows(NamedTuple):
    """A sparse matrix [pairs, words] as its entries."""

    row: Tensor  # int64
    word: Tensor  # int64
    value: Tensor  # float32
    shape: tuple[int, int]

    def times(self, weights: Tensor) -> Tensor:
        """[words] to [pairs]."""
        return torch.zeros(self.shape[0]).index_add_(0, self.row, self.value * weights[self.word])

    def back(self, pulls: Tensor) -> Tensor:
        """[pairs] to [words]."""
        return torch.zeros(self.shape[1]).index_add_(0, self.word, self.value * pulls[self.row])


def _difference(
    counted: tuple[list[Counter[str]], list[Counter[str]]], rows: Sequence[int], vocabulary: dict[str, int]
) -> Rows:
    """Log counts of the chosen reply minus those of the rejected one."""
    row, word, value = [], [], []
    for at, i in enumerate(rows):
        for side, sign in ((0, 1), (1, -1)):
            for text, count in counted[side][i].items():
                if (column := vocabulary.get(text)) is not None:
                    row.append(at)
                    word.append(column)
                    value.append(sign * count)
    signed = torch.tensor(value, dtype=torch.float32)
    entries = torch.tensor(row, dtype=torch.int64), torch.tensor(word, dtype=torch.int64)
    return Rows(*entries, signed.sign() * signed.abs().log1p(), (len(rows), max(len(vocabulary), 1)))


def _fit(x: Rows, penalty: float) -> Tensor:
    """Weights [words] of the penalised logistic loss of ``x @ weights``, by Nesterov's accelerated descent."""
    pairs, count = x.shape
    # The largest step that is safe: the logistic loss bends by at most a quarter of the matrix's norm squared.
    largest = torch.ones(count)
    for _ in range(10):
        largest = x.back(x.times(largest))
        largest = largest / largest.norm().clamp(min=1e-30)
    bend = float(x.times(largest).square().sum()) / (4 * pairs) + penalty
    weights = ahead = torch.zeros(count)
    for step in range(STEPS):
        gradient = penalty * ahead - x.back(torch.sigmoid(-x.times(ahead))) / pairs
        new = ahead - gradient / bend
        ahead = new + (step / (step + 3)) * (new - weights)
        weights = new
    return weights


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
