"""Who decides between two responses: a reward model, a function that scores, or a function that compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.base.statistics import Estimate, mean
from trainer.data.prompt import asked
from trainer.evaluation.win_rate import win_rate
from trainer.rewards.compare import COMPARE, Compare, both_ways
from trainer.rewards.names import function_of
from trainer.rewards.sources import Reward, reward_from
from trainer.sampling.rollout import Rollout


@dataclass(frozen=True)
class Responses:
    """What one policy said."""

    records: list[dict[str, Any]]
    texts: list[str]
    rollout: Rollout
    tokenizer: Any

    @property
    def lengths(self) -> list[int]:
        """Tokens per response."""
        return [len(self.rollout.response(i)) for i in range(len(self.records))]


class Judge:
    """Scores or compares.

    Args:
        reward: Gives a reward for the tokenizer of a policy; None where responses can only be compared.
        compare: Says how much it prefers the first of two responses, from 0 to 1.
    """

    def __init__(self, reward: Callable[[Any], Reward] | None, compare: Compare | None) -> None:
        self.reward, self.compare = reward, compare
        self._known: dict[int, list[float]] = {}

    def scores(self, responses: Responses) -> list[float] | None:
        """One score per response, None if it only compares."""
        if self.reward is None:
            return None
        if id(responses) not in self._known:
            score = self.reward(responses.tokenizer)
            self._known[id(responses)] = score(responses.rollout, responses.records).tolist()
        return self._known[id(responses)]

    def win_rate(self, mine: Responses, theirs: Responses) -> Estimate:
        """Share of prompts that the first policy wins, ties as halves, with a 95 % interval.

        A judge that compares is asked in both orders, and the answers are averaged: language models favour a place.

        Raises:
            ValueError: It gave the wrong number of answers, or one outside of [0, 1].
        """
        ours, others = self.scores(mine), self.scores(theirs)
        if ours is not None and others is not None:
            return win_rate(ours, others)
        prompts = [asked(r["prompt"]) for r in mine.records]
        assert self.compare is not None
        return mean(both_ways(self.compare, prompts, mine.texts, theirs.texts))


def judge_from(name: str, *, max_length: int, max_tokens: int, device: torch.device) -> Judge:
    """A judge by name.

    Args:
        name: A reward model's folder, ``module:function`` that scores, or ``compare:module:function``.
        max_length: Tokens that a reward model reads.
        max_tokens: Tokens per forward pass.
        device: Where a reward model goes.

    Raises:
        ValueError: It is none of these.
    """
    if not name.startswith(COMPARE):
        return Judge(
            lambda tokenizer: reward_from(name, tokenizer, max_length=max_length, max_tokens=max_tokens, device=device),
            None,
        )
    return Judge(None, function_of(name, "judge"))
