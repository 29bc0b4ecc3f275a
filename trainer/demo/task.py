"""The demo's world: put words in order, and say so politely.

Demonstrators are imperfect, annotators are noisy, and a judge that nobody trains on knows what was wanted.
Held out are whole sets of words: none of them, in any order, occurs in training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = (
    *("almond", "basil", "cherry", "date", "elder", "fig", "grape", "honey", "iris", "jasmine"),
    *("kale", "lemon", "mango", "nutmeg", "olive", "pear", "quince", "rice", "salt", "thyme"),
)
POLITE, HEDGED, RUDE = ("sure :", "happily :"), ("maybe :", "i guess :"), ("ugh :", "fine , whatever :")
CLOSING = ("", ". enjoy", ". hope this helps")
VOCABULARY = sorted(
    {w for text in ("please sort :", *POLITE, *HEDGED, *RUDE, *CLOSING) for w in text.split()} | set(WORDS)
)
COUNT = 5


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in a response."""

    score: float
    exact: bool
    clean: bool  # polite opening, nothing odd around the words


def prompts(count: int, source: random.Random, *, held_out: bool) -> list[str]:
    """Requests. A set of words belongs to training or to the held-out share for good."""
    found: list[str] = []
    while len(found) < count:
        words = source.sample(WORDS, COUNT)
        if _is_held_out(words) == held_out:
            found.append("please sort : " + " ".join(words))
    return found


def demonstrate(prompt: str, source: random.Random) -> str:
    """An imperfect demonstration: two in five have an error in the order, two in five hedge or are rude."""
    words = sorted(_asked(prompt))
    if source.random() < 0.4:
        i = source.randrange(COUNT - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    opening = source.choice(source.choices((POLITE, HEDGED, RUDE), weights=(6, 2, 2))[0])
    return f"{opening} {' '.join(words)} {source.choice(CLOSING)}".strip()


def judge(prompt: str, response: str, ended: bool = True) -> Verdict:
    """The hidden judge: order counts most, then tone, then brevity and an end."""
    asked = _asked(prompt)
    tokens = response.split()
    opening = next((o for o in (*POLITE, *HEDGED, *RUDE) if response.startswith(o)), None)
    body = tokens[len(opening.split()) if opening else 0 :]
    said = [t for t in body if t in WORDS]
    closing = " ".join(body[len(said) :]) if body[: len(said)] == said else None
    exact = body[:COUNT] == sorted(asked) and said == sorted(asked)
    score = 3.0 if exact else 2.0 * _closeness(said, asked) - 1.0
    score += 1.0 if opening in POLITE else -0.5 if opening in HEDGED else -1.0
    score -= 0.25 * max(0, len(tokens) - COUNT - 2)
    score -= 0.0 if closing in CLOSING else 1.0
    score -= 0.0 if ended else 1.0
    return Verdict(score, exact, opening in POLITE and closing in CLOSING)


def hidden_judge(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[object]) -> list[float]:
    """The judge as a gold reward, for a monitor to look at. Whether a response ended is not asked here."""
    return [judge(prompt, response).score for prompt, response in zip(prompts, responses, strict=True)]


def annotate(prompt: str, responses: Sequence[tuple[str, bool]], source: random.Random, noise: float) -> list[int]:
    """Ranks from best (0) to worst, by an annotator whose choices follow Plackett-Luce around the judge's score.

    Adding Gumbel noise to scores and sorting draws from that model exactly.

    Args:
        prompt: The request.
        responses: Texts, and whether each ended by itself.
        source: Randomness.
        noise: Scale of the Gumbel noise, in units of the judge's score.
    """
    scores = [judge(prompt, text, ended).score for text, ended in responses]
    heard = [s - noise * math.log(-math.log(source.random() or 0.5)) if noise else s for s in scores]
    return [sum(other > mine for other in heard) for mine in heard]  # equal scores share a rank


def _asked(prompt: str) -> list[str]:
    return prompt.split()[-COUNT:]


def _is_held_out(words: Sequence[str]) -> bool:
    # Not hash(): it differs between processes.
    return sum((WORDS.index(w) + 1) ** 2 for w in words) % 5 == 0


def _closeness(said: Sequence[str], asked: Sequence[str]) -> float:
    """Share of pairs of asked words that are said once each and in order, from 0 to 1."""
    place = {w: said.index(w) for w in asked if said.count(w) == 1}
    ordered = sorted(asked)
    pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
    good = sum(a in place and b in place and place[a] < place[b] for a, b in pairs)
    extra = max(0, len(said) - len(asked))
    return max(0.0, good / len(pairs) - 0.1 * extra)
