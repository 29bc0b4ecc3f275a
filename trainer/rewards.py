"""Where rewards come from: a reward model, or any Python function of prompts and responses."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.models import ScalarModel, load_scalar, resolve
from trainer.packing import pack, split
from trainer.rollout import Rollout
from trainer.text import decode, encode_pairs

RewardFunction = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]
Reward = Callable[[Rollout, Sequence[dict[str, Any]]], Tensor]
"""Of a rollout and its prompts' records: [S] float32 scores."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_answer(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    """1 where the last number of the response is that of the record's ``answer``, else 0.

    Example:
        >>> exact_answer(["2 + 2?"], ["It is 4."], [{"answer": "2 + 2 = 4\\n#### 4"}])
        [1.0]
    """

    def last(text: str) -> float | None:
        found = NUMBER.findall(text)
        return float(found[-1].replace(",", "")) if found else None

    return [
        float(last(response) is not None and last(response) == last(str(extra.get("answer", ""))))
        for response, extra in zip(responses, extras, strict=True)
    ]


def reward_from(name: str, tokenizer: Any, *, max_length: int, max_tokens: int, device: torch.device) -> Reward:
    """A reward by name: a reward model's folder, ``module:function``, or a function of this module.

    Raises:
        ValueError: If it is none of these.
    """
    if (Path(resolve(name)) / "config.json").exists():
        model = load_scalar(name).to(device).requires_grad_(False)
        return _from_model(model, tokenizer, max_length=max_length, max_tokens=max_tokens, device=device)
    module, _, function = name.rpartition(":")
    try:
        found = getattr(importlib.import_module(module or __name__), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: got {name!r}, want a reward model's folder or module:function ({error})") from error
    return _from_function(found, name, tokenizer)


def _from_model(
    model: ScalarModel, tokenizer: Any, *, max_length: int, max_tokens: int, device: torch.device
) -> Reward:
    # Equal vocabularies give equal ids. Otherwise text is the common language, and the model reads its own tokens.
    shared = model.tokenizer.get_vocab() == tokenizer.get_vocab()

    @torch.no_grad()
    def score(rollout: Rollout, records: Sequence[dict[str, Any]]) -> Tensor:
        samples = rollout.samples
        if not shared:
            prompts, ended = [r["prompt"] for r in records], [not t for t in rollout.truncated]
            samples = encode_pairs(model.tokenizer, prompts, responses_of(rollout, tokenizer), max_length, ended)
        parts = split([len(s.tokens) for s in samples], max_tokens)
        return torch.cat([model.scores(pack([samples[i] for i in part], device)) for part in parts])

    return score


def _from_function(function: RewardFunction, name: str, tokenizer: Any) -> Reward:
    def score(rollout: Rollout, records: Sequence[dict[str, Any]]) -> Tensor:
        responses = responses_of(rollout, tokenizer)
        prompts, extras = [r["prompt"] for r in records], [r.get("extra", {}) for r in records]
        scores = [float(x) for x in function(prompts, responses, extras)]
        if len(scores) != len(responses):
            raise ValueError(f"reward: {name} gave {len(scores)} scores for {len(responses)} responses")
        for response, x in zip(responses, scores, strict=True):
            if not math.isfinite(x):
                raise ValueError(f"reward: {name} gave {x} to the response {response!r}, want a finite number")
        return torch.tensor(scores)

    return score


def responses_of(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Responses as text, without special tokens."""
    return decode(tokenizer, [rollout.response(i) for i in range(len(rollout.samples))])
