"""How far annotators agree about the same pairs, corrected for the agreement that guessing would give."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.base.statistics import Estimate, proportion

RESAMPLES = 1000
FIRST, TIE, SECOND = 1, 0, -1  # a judgment: the first reply is better, neither, the second


@dataclass(frozen=True)
class Judgment:
    """What one annotator said about one pair of replies."""

    pair: Hashable
    """The prompt and both replies in a fixed order, so that everybody speaks about the same thing."""
    annotator: str
    choice: int
    """FIRST, TIE or SECOND, in that fixed order."""
    truth: int | None = None
    """The known right choice, where the pair is a gold question."""


@dataclass(frozen=True)
class Agreement:
    """What several labels of the same pairs say about each other."""

    pairs: int
    """Pairs that two or more annotators have judged."""
    judgments: int
    """Judgments of those pairs."""
    observed: float
    """Share of the pairs of judgments that agree."""
    expected: float
    """The same for judgments that are shuffled over pairs and sides."""
    alpha: Estimate
    """Krippendorff's alpha for nominal data: 1 is full agreement, 0 is guessing."""


def agreement(judgments: Iterable[Judgment], *, seed: int = 0) -> Agreement | None:
    """Krippendorff's alpha over pairs of replies, with a 95 % interval from a bootstrap over pairs.

    Alpha is 1 - observed / expected disagreement; it allows any number of annotators per pair, and missing ones
    (Krippendorff 2004, Content Analysis, chapter 11). Which of two replies is called the first is arbitrary, so both
    orders are counted: "first" and "second" are expected equally often, and only ties have a share of their own.

    Args:
        judgments: In any order; a second judgment of a pair by the same annotator counts as another annotator's.
        seed: Of the bootstrap.

    Returns:
        None if no pair was judged twice.

    Example:
        >>> same = [Judgment(pair, who, choice) for pair, choice in (("a", 1), ("b", -1)) for who in "xyz"]
        >>> agreement(same).alpha.value
        1.0
    """
    units: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for judgment in judgments:
        units[judgment.pair][judgment.choice] += 1
    counts = [unit for unit in units.values() if unit.total() > 1]
    if not counts:
        return None
    source = random.Random(seed)
    # One resampled pair is its three numbers, not its counter: a thousand bootstraps of many pairs stay quick.
    parts = [_part(unit) for unit in counts]
    draws = sorted(_alpha(source.choices(parts, k=len(parts))) for _ in range(_resamples(len(parts))))
    low, high = draws[int(0.025 * len(draws))], draws[int(0.975 * len(draws))]
    disagree, total, ties = (sum(column) for column in zip(*parts, strict=True))
    value = _alpha(parts)
    return Agreement(
        pairs=len(counts), judgments=int(total), observed=1 - disagree / total, expected=1 - _chance(total, ties),
        alpha=Estimate(value, min(low, value), max(high, value)),
    )  # fmt: skip


def gold_accuracy(judgments: Iterable[Judgment]) -> dict[str, Estimate]:
    """Share of gold questions that each annotator answered right, worst first, with Wilson's 95 % interval.

    >>> found = gold_accuracy([Judgment("a", "ann", 1, truth=1), Judgment("b", "bob", 1, truth=-1)])
    >>> {name: share.value for name, share in found.items()}
    {'bob': 0.0, 'ann': 1.0}
    """
    asked, right = Counter[str](), Counter[str]()
    for judgment in judgments:
        if judgment.truth is not None:
            asked[judgment.annotator] += 1
            right[judgment.annotator] += judgment.choice == judgment.truth
    shares = {name: proportion(right[name], asked[name]) for name in sorted(asked)}
    return dict(sorted(shares.items(), key=lambda item: item[1].value))


def with_others(judgments: Sequence[Judgment]) -> dict[str, Estimate]:
    """Share of the others' judgments of the same pairs that each annotator shares, lowest first."""
    units: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for judgment in judgments:
        units[judgment.pair][judgment.choice] += 1
    met, shared = Counter[str](), Counter[str]()
    for judgment in judgments:
        unit = units[judgment.pair]
        met[judgment.annotator] += unit.total() - 1
        shared[judgment.annotator] += unit[judgment.choice] - 1
    shares = {name: proportion(shared[name], met[name]) for name in sorted(met) if met[name]}
    return dict(sorted(shares.items(), key=lambda item: item[1].value))


def _part(unit: Mapping[int, int]) -> tuple[float, float, float]:
    """Disagreement, judgments and ties of one pair; a judgment is compared with the others of its pair."""
    n = sum(unit.values())
    disagree = sum(k * (n - k) for k in unit.values()) / (n - 1)
    return disagree, float(n), float(unit.get(TIE, 0))


def _alpha(parts: Sequence[tuple[float, float, float]]) -> float:
    disagree, total, ties = (sum(column) for column in zip(*parts, strict=True))
    chance = _chance(total, ties)
    # Everybody always said "tie": nothing varied, so nothing can be said.
    return 1 - (disagree / total) / chance if chance else float("nan")


def _chance(total: float, ties: float) -> float:
    """Probability that two judgments differ when they are drawn without replacement from all of them."""
    side = (total - ties) / 2
    return (total**2 - 2 * side**2 - ties**2) / (total * (total - 1))


def _resamples(pairs: int) -> int:
    """Fewer for large data, where a second's work would otherwise become a minute and the interval is narrow anyway."""
    return max(200, min(RESAMPLES, 2_000_000 // max(pairs, 1)))
