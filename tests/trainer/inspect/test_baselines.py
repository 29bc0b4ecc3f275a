"""What a reward model has to beat."""

from __future__ import annotations

import random

from trainer.inspect.baselines import Pair, bag_of_words, length_baseline


def test_a_bag_of_words_finds_a_word_and_nothing_in_noise():
    source = random.Random(0)
    filler = [f"w{i}" for i in range(40)]

    def text(word: str = "") -> str:
        return " ".join([*source.choices(filler, k=8), word])

    planted = [Pair(f"p{i}", text("kindly"), text()) for i in range(200)]
    assert bag_of_words(planted).low > 0.95
    noise = [Pair(f"p{i}", text(), text()) for i in range(300)]
    found = bag_of_words(noise)
    assert found.low < 0.5 < found.high
    # Every pair four times under one prompt: who has seen one of them knows the others, so folds are of prompts.
    assert bag_of_words([p for p in noise for _ in range(4)]).value < 0.6
    assert length_baseline([Pair("p", "a b", "a"), Pair("q", "a", "a b"), Pair("r", "a", "b")]).value == 0.5
