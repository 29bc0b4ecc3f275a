"""The demo's world is as told: its words, its hidden judge and its annotators."""

from __future__ import annotations

import random

import pytest

from trainer.demo import task


def test_no_set_of_words_is_both_trained_on_and_held_out() -> None:
    source = random.Random(0)
    trained, held_out = (
        {frozenset(p.split()[3:]) for p in task.prompts(3000, source, held_out=held)} for held in (False, True)
    )
    assert not trained & held_out
    assert len(held_out) > 1000


def test_the_judge_knows_what_is_wanted() -> None:
    prompt = "please sort : salt lemon fig olive mango"
    best = task.judge(prompt, "sure : fig lemon mango olive salt")
    assert best.exact
    assert best.clean
    worse = {
        "order": "sure : lemon fig mango olive salt",
        "hedged": "maybe : fig lemon mango olive salt",
        "rude": "ugh : fig lemon mango olive salt",
        "long": "sure : fig lemon mango olive salt . hope this helps",
        "foreign": "sure : fig lemon mango olive thyme",
        "repeated": "sure : fig lemon mango olive salt salt",
        "babble": "sure : fig lemon mango olive salt : :",
    }
    for name, response in worse.items():
        assert task.judge(prompt, response).score < best.score, name
    assert task.judge(prompt, "sure : fig lemon mango olive salt", ended=False).score < best.score
    for name in ("order", "foreign", "repeated"):
        assert not task.judge(prompt, worse[name]).exact, name


def test_annotators_follow_plackett_luce() -> None:
    """With scores s, the first place goes to i with probability softmax(s / noise)."""
    prompt, source = "please sort : salt lemon fig olive mango", random.Random(0)
    pair = [("sure : fig lemon mango olive salt", True), ("maybe : fig lemon mango olive salt", True)]
    gap = task.judge(prompt, pair[0][0]).score - task.judge(prompt, pair[1][0]).score
    first = sum(task.annotate(prompt, pair, source, noise=2.0)[0] == 0 for _ in range(4000)) / 4000
    assert first == pytest.approx(1 / (1 + 2.718281828 ** (-gap / 2.0)), abs=0.03)
    assert task.annotate(prompt, [*pair, pair[0]], source, noise=0.0) == [0, 2, 0]


def test_four_in_ten_demonstrations_are_out_of_order() -> None:
    source = random.Random(0)
    prompts = task.prompts(2000, source, held_out=False)
    verdicts = [task.judge(p, task.demonstrate(p, source)) for p in prompts]
    assert sum(v.exact for v in verdicts) / 2000 == pytest.approx(0.6, abs=0.04)
    assert sum(v.clean for v in verdicts) / 2000 == pytest.approx(0.6, abs=0.04)
