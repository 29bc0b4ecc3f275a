"""Where rewards come from: a reward model, a Python function, an HTTP endpoint, or a judge that compares.

Each gives one finite number per response, or an error that names the response.
"""

from __future__ import annotations

import importlib
import math
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import address, permission
from trainer.address import is_address, redacted
from trainer.models import ScalarModel, load_scalar, resolve
from trainer.packing import pack, split
from trainer.reward_compare import COMPARE, by_comparison
from trainer.reward_http import endpoint
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


BUILT_IN: dict[str, RewardFunction] = {"exact_answer": exact_answer}


def reward_from(name: str, tokenizer: Any, *, max_length: int, max_tokens: int, device: torch.device) -> Reward:
    """A reward by name.

    Args:
        name: A reward model's folder; ``module:function``; ``exact_answer``; ``http://...``; or
            ``compare:module:function``.
        tokenizer: Of the policy.
        max_length: Tokens that a reward model with another tokenizer reads.
        max_tokens: Tokens per forward pass of a reward model.
        device: Where a reward model goes.

    Raises:
        ValueError: If it is none of these.
    """
    if is_address(name):
        return _from_function(endpoint(name), redacted(name), tokenizer, alone=False)
    if name.startswith(COMPARE):
        return _from_function(by_comparison(function_of(name)), name, tokenizer, alone=False)
    if is_model(name):
        model = load_scalar(name).to(device).requires_grad_(False)
        return _from_model(model, name, tokenizer, max_length=max_length, max_tokens=max_tokens, device=device)
    return _from_function(function_of(name), name, tokenizer)


def is_model(name: str) -> bool:
    """Whether a name stands for a reward model on this disk."""
    return (Path(resolve(name)) / "config.json").exists()


def function_of(name: str, option: str = "reward") -> Callable[..., Any]:
    """The function of this module, ``module:function`` or ``compare:module:function`` that a name stands for.

    Raises:
        ValueError: There is none, or its module may not be imported (``trainer.permission``).
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, found = permission.function(name, option)
    permission.look_here()
    file = permission.source_of(module)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        if file is None:
            raise permission.none_such(name, option, error) from error
        what = " ".join(f"{type(error).__name__}: {error}".split()) + _line_in(file, error)
        raise ValueError(f"{option}: got {name!r}, which is in {file}, but to import that fails: {what}") from error
    try:
        return getattr(loaded, found)
    except AttributeError as error:
        raise permission.none_such(name, option, error) from error


def _line_in(file: Path, error: BaseException) -> str:
    """Where in the user's own module something failed, if it did not fail before its first line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" (line {lines[-1]})" if lines else ""


def check_source(name: str, option: str = "reward", *, load: bool = False) -> None:
    """Refuses what is no reward, an address that cannot be asked, and code that is not allowed.

    Args:
        name: As ``reward_from`` takes it.
        option: For the message.
        load: Import a function's module, which runs it; otherwise it is only read.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    if is_address(name):
        address.read(name)
    elif not is_model(name) and name not in BUILT_IN:
        function_of(name, option) if load else permission.check(name, option)


def _from_model(
    model: ScalarModel, name: str, tokenizer: Any, *, max_length: int, max_tokens: int, device: torch.device
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
        scores = torch.cat([model.scores(pack([samples[i] for i in part], device)) for part in parts])
        if not bool(scores.isfinite().all()):
            at = int((~scores.isfinite()).nonzero()[0])
            _refuse(name, float(scores[at]), records[at]["prompt"], responses_of(rollout, tokenizer)[at])
        return scores

    return score


def _from_function(function: RewardFunction, name: str, tokenizer: Any, *, alone: bool = True) -> Reward:
    """``alone``: whether the function can be asked about one sample, to find the one at which it fails."""

    def score(rollout: Rollout, records: Sequence[dict[str, Any]]) -> Tensor:
        responses = responses_of(rollout, tokenizer)
        prompts, extras = [r["prompt"] for r in records], [r.get("extra", {}) for r in records]
        try:
            found = list(function(prompts, responses, extras))
        except Exception as error:
            what = f"reward: {name} raised {type(error).__name__}: {error}"
            where = _sample(function, prompts, responses, extras) if alone else ""
            raise ValueError(what + where) from error
        if len(found) != len(responses):
            raise ValueError(
                f"reward: {name} gave {len(found)} scores for {len(responses)} responses, of which the first is "
                f"{responses[0]!r:.200} to the prompt {prompts[0]!r:.200}"
            )
        scores = [_number(name, *one) for one in zip(found, prompts, responses, strict=True)]
        return torch.tensor(scores)

    return score


def _number(name: str, x: Any, prompt: str, response: str) -> float:
    """A finite number, as float32 too; a text that looks like one was not meant as a score."""
    try:
        value = math.nan if isinstance(x, str | bytes) else float(x)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:
        _refuse(name, x, prompt, response)
    return value


def _refuse(name: str, x: object, prompt: str, response: str) -> None:
    raise ValueError(
        f"reward: {name} gave {x!r:.60} to the response {response!r:.200}, want a finite number; the prompt was "
        f"{prompt!r:.200}"
    )


def _sample(
    function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]
) -> str:
    """The first sample at which the function fails alone, if there is one."""
    for i, (prompt, response, extra) in enumerate(zip(prompts, responses, extras, strict=True)):
        try:
            function([prompt], [response], [extra])
        except Exception:
            return f"; so it does on sample {i} alone: prompt {prompt!r:.200}, response {response!r:.200}"
    return f"; on none of the {len(responses)} samples alone, of which the first response is {responses[0]!r:.200}"


def responses_of(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Responses as text, without special tokens."""
    return decode(tokenizer, [rollout.response(i) for i in range(len(rollout.samples))])
