"""Small models, samples and files for the tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.data.packing import Sample
from trainer.models.policy import Policy, ScalarModel, scalar_from
from trainer.models.tiny import tiny_policy, word_tokenizer

LETTERS = [chr(c) for c in range(ord("a"), ord("a") + 20)]


def small_policy(seed: int = 0, scale: float = 4.0) -> Policy:
    """Two layers of 32, with a head far enough from uniform that errors show."""
    policy = tiny_policy(word_tokenizer(LETTERS), seed, hidden=32, layers=2)
    with torch.no_grad():
        policy.weight.mul_(scale)
    return policy


def small_scalar(seed: int = 0) -> ScalarModel:
    return scalar_from(small_policy(seed), torch.Generator().manual_seed(seed))


def ragged(count: int, seed: int = 0, longest: int = 40) -> list[Sample]:
    """Samples of two to ``longest`` tokens, specials among them."""
    source = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, (1,), generator=source))
        tokens = torch.randint(0, len(LETTERS) + 2, (length,), generator=source).tolist()
        samples.append(Sample(tokens, int(torch.randint(1, length, (1,), generator=source))))
    return samples


def write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def share_of_a(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    """A reward: the share of the letter a among the words of a response."""
    return [r.split().count("a") / max(len(r.split()), 1) for r in responses]


def share_of_digits(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    """A reward: the share of digits among the characters of a response. The records are those of the file."""
    assert all("####" in e["answer"] for e in extras)
    return [sum(c.isdigit() for c in r) / max(len(r), 1) for r in responses]


def broken_reward(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    """A reward with nothing to say."""
    return [float("nan") for _ in responses]


def short_reward(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    """A reward that forgets one."""
    return [0.0 for _ in responses[1:]]
