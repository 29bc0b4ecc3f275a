"""The bag of words: what it counts, and that its weights are the best there are."""

from __future__ import annotations

import math
import random
from collections import Counter

import torch

from trainer.base.statistics import Estimate
from trainer.inspect import baselines
from trainer.inspect.baselines import Pair, bag_of_words


def test_words_count_by_the_logarithm_of_one_more():
    found = baselines._differences(
        [(Counter("aab"), Counter("ac")), (Counter("x"), Counter()), (Counter(), Counter("bbb"))], {"a": 0, "b": 1}
    ).to_dense()
    two, three, four = (math.log(n) for n in (2, 3, 4))
    torch.testing.assert_close(found, torch.tensor([[three - two, two], [0, 0], [0, -four]]), rtol=1e-6, atol=1e-6)


def test_the_weights_are_the_best_there_are():
    """The slope of the penalised loss is zero there; it is written out here in float64."""
    rng, penalty = torch.Generator().manual_seed(0), 0.01
    x = torch.randn(80, 120, generator=rng) * (torch.rand(80, 120, generator=rng) < 0.2)
    weights = baselines._fit(x.to_sparse(), penalty).double()
    slope = penalty * weights - x.double().T @ torch.sigmoid(-(x.double() @ weights)) / len(x)
    at_zero = x.double().mean(0).norm() / 2
    assert weights.norm() > 1
    assert slope.norm() < 1e-3 * at_zero


def test_the_same_file_gives_the_same_numbers():
    source = random.Random(0)
    letters = [" ".join(source.choices("abcdefghij", k=8)) for _ in range(400)]
    pairs = [Pair(f"p{i}", letters[2 * i] + " k" * source.randrange(2), letters[2 * i + 1]) for i in range(200)]
    found = bag_of_words(pairs)
    assert 0.5 < found.value < 1.0
    assert bag_of_words(pairs) == found


def test_without_a_word_that_two_replies_share_it_guesses():
    for pairs in ([Pair(f"p{i}", f"a{i}", f"b{i}") for i in range(60)], [Pair(f"p{i}", "", "") for i in range(60)]):
        assert bag_of_words(pairs) == Estimate(0.5, 0.5, 0.5)
