"""Who decides between two responses: a reward model, a function that scores, or a function that compares."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.evaluate import Estimate, mean, win_rate
from trainer.reward_compare import COMPARE, Compare
from trainer.rewards import Reward, reward_from
from trainer.rollout import Rollout


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
        prompts = [r["prompt"] for r in mine.records]
        ahead, behind = self._asked(prompts, mine.texts, theirs.texts), self._asked(prompts, theirs.texts, mine.texts)
        return mean([(a + 1 - b) / 2 for a, b in zip(ahead, behind, strict=True)])

    def _asked(self, prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        assert self.compare is not None
        said = [float(x) for x in self.compare(prompts, first, second)]
        if len(said) != len(prompts):
            raise ValueError(f"judge: gave {len(said)} answers for {len(prompts)} pairs of responses")
        for prompt, x in zip(prompts, said, strict=True):
            if not 0 <= x <= 1:
                raise ValueError(f"judge: gave {x} for the prompt {prompt!r:.80}, want a number from 0 to 1")
        return said


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
    module, _, function = name.removeprefix(COMPARE).rpartition(":")
    try:
        return Judge(None, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"judge: got {name!r}, want compare:module:function ({error})") from error
