"""Agreement of annotators against the textbook, and beside guessing and unanimity."""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations

import pytest

from trainer.inspect.agreement import FIRST, SECOND, TIE, Judgment, agreement, gold_accuracy, with_others


def guesses(pairs: int, per_pair: int, source: random.Random, right: float = 0.5) -> list[Judgment]:
    """Annotators that find the truth, which is the first side for one half of the pairs, this often."""
    return [
        Judgment(i, f"a{k}", FIRST if (source.random() < right) == (i % 2 == 0) else SECOND)
        for i in range(pairs)
        for k in range(per_pair)
    ]


def standard_alpha(judgments: list[Judgment]) -> float:
    """Krippendorff's nominal alpha by its textbook coincidence matrix; sides have a share of their own here."""
    units: dict[object, list[int]] = {}
    for j in judgments:
        units.setdefault(j.pair, []).append(j.choice)
    matrix: Counter[tuple[int, int]] = Counter()
    for values in units.values():
        for a, b in permutations(range(len(values)), 2):
            matrix[values[a], values[b]] += 1 / (len(values) - 1)
    totals: Counter[int] = Counter()
    for (a, _), n in matrix.items():
        totals[a] += n
    n = sum(totals.values())
    observed = sum(count for (a, b), count in matrix.items() if a != b)
    expected = sum(totals[a] * totals[b] for a in totals for b in totals if a != b) / (n - 1)
    return 1 - observed / expected


def test_alpha_is_the_textbook_one_where_sides_are_balanced():
    source = random.Random(1)
    said = [j for j in guesses(60, 3, source, right=0.8) if source.random() < 0.9]
    said += [Judgment(("tie", i), f"a{k}", TIE) for i in range(8) for k in range(2)]
    # Each pair once more with its sides exchanged: now both sides are equally frequent by construction.
    said += [Judgment(("turned", j.pair), j.annotator, -j.choice) for j in said]
    found = agreement(said)
    assert found is not None
    alone = {p for p, n in Counter(j.pair for j in said).items() if n == 1}
    assert found.alpha.value == pytest.approx(standard_alpha([j for j in said if j.pair not in alone]), abs=1e-12)
    assert found.alpha.low < found.alpha.value < found.alpha.high


def test_alpha_does_not_depend_on_which_side_is_called_the_first():
    source = random.Random(2)
    said = guesses(80, 3, source, right=0.75)
    turned = {i for i in range(80) if source.random() < 0.5}
    again = [Judgment(j.pair, j.annotator, -j.choice if j.pair in turned else j.choice) for j in said]
    one, other = agreement(said), agreement(again)
    assert one is not None
    assert other is not None
    assert one.alpha == other.alpha
    assert one.observed == other.observed


def test_guessing_is_zero_and_unanimity_is_one():
    guessed = agreement(guesses(400, 3, random.Random(3)))
    assert guessed is not None
    assert guessed.alpha.low < 0 < guessed.alpha.high
    assert guessed.observed == pytest.approx(0.5, abs=0.05)
    sure = agreement(guesses(50, 2, random.Random(3), right=1.0))
    assert sure is not None
    assert sure.alpha.value == 1.0
    assert agreement([Judgment("p", "a", FIRST), Judgment("q", "b", FIRST)]) is None


def test_annotators_stand_beside_the_others_and_beside_the_truth():
    said = [Judgment("p", "a", FIRST, FIRST), Judgment("p", "b", FIRST, FIRST), Judgment("p", "c", SECOND, FIRST)]
    assert {k: v.value for k, v in gold_accuracy(said).items()} == {"c": 0.0, "a": 1.0, "b": 1.0}
    assert next(iter(gold_accuracy(said))) == "c"
    assert {k: v.value for k, v in with_others(said).items()} == {"c": 0.0, "a": 0.5, "b": 0.5}
