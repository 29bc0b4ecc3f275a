"""A ranked list as pairs of replies."""

from __future__ import annotations

from typing import Any

from tests.support.small import small_policy
from trainer.stages.preference import dpo
from trainer.stages.preference.replies import parts_of, totals_of


def test_a_ranked_list_stands_for_its_pairs_and_the_chosen_reply_comes_first() -> None:
    record = {"prompt": "a", "responses": ["b", "c d", "e f g"], "ranks": [2, 1, 1]}
    tokenizer = small_policy().tokenizer

    def nothing(*_: Any) -> Any:
        raise AssertionError

    replies = dpo.Pairs("dpo", 64, nothing).encode(tokenizer, [record])
    texts = [tokenizer.decode(s.tokens[s.prompt_length :], skip_special_tokens=True) for s in replies.samples]
    assert texts == ["c d", "b", "e f g", "b"]
    assert (replies.units, replies.good) == ([(0, 1), (2, 3)], [True, False, True, False])
    (part,) = parts_of(replies, [(2, 3), (0, 1)], None, 1000, "cpu")
    assert part.packed.lengths == (5, 3, 4, 3)
    assert totals_of([part]) == (2, 2, 4 + 3)  # two pairs, and the tokens of the chosen replies with their ends
