"""A reward from a judge that only compares: how often a response beats the others to its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

COMPARE = "compare:"
Compare = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]
"""Of prompts, first and second responses: how much each first one is preferred, from 0 to 1."""


def by_comparison(
    compare: Compare,
) -> Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], list[float]]:
    """A reward function out of a judge that compares.

    A response meets every other response to the same prompt, or, where it is the only one, the ``response`` of its
    record. Each pair is shown in both orders, because judges favour a place; the score is the share that it wins.

    Args:
        compare: The judge.

    Raises:
        ValueError: A response has nobody to meet, or an answer is not a number from 0 to 1.

    Example:
        >>> shorter = lambda prompts, first, second: [float(len(a) < len(b)) for a, b in zip(first, second)]
        >>> by_comparison(shorter)(["p", "p", "p"], ["xxx", "x", "xx"], [{}, {}, {}])
        [0.0, 1.0, 0.5]
    """

    def score(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
        together: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            together.setdefault(prompt, []).append(i)
        meetings: list[tuple[int, str]] = []
        for i, (prompt, extra) in enumerate(zip(prompts, extras, strict=True)):
            others = [responses[j] for j in together[prompt] if j != i] or _own(extra)
            if not others:
                raise ValueError(
                    f"a judge that compares has nothing to hold against the only response to {prompt!r:.200}; sample "
                    "several responses per prompt (grpo), or give records a field response"
                )
            meetings += [(i, other) for other in others]
        mine, other = [responses[i] for i, _ in meetings], [other for _, other in meetings]
        asked = [prompts[i] for i, _ in meetings]
        won, met = [0.0] * len(responses), [0] * len(responses)
        for (i, _), share in zip(meetings, both_ways(compare, asked, mine, other), strict=True):
            won[i] += share
            met[i] += 1
        return [w / m for w, m in zip(won, met, strict=True)]

    return score


def both_ways(compare: Compare, prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    """How much each first response is preferred, averaged over both orders, because judges favour a place.

    Args:
        compare: The judge.
        prompts: One per pair.
        first: Responses to them.
        second: Others.

    Raises:
        ValueError: It gave the wrong number of answers, or one that is no number from 0 to 1.
    """
    ahead, behind = _answers(compare, prompts, first, second), _answers(compare, prompts, second, first)
    return [(a + 1 - b) / 2 for a, b in zip(ahead, behind, strict=True)]


def _own(extra: dict[str, Any]) -> list[str]:
    return [extra["response"]] if isinstance(extra.get("response"), str) else []


def _answers(compare: Compare, prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    said = [float(x) for x in compare(prompts, first, second)]
    if len(said) != len(prompts):
        raise ValueError(f"a judge that compares gave {len(said)} answers for {len(prompts)} pairs")
    for prompt, x in zip(prompts, said, strict=True):
        if not 0 <= x <= 1:
            raise ValueError(
                f"a judge that compares gave {x} for the prompt {prompt!r:.200}, want a number from 0 to 1"
            )
    return said
