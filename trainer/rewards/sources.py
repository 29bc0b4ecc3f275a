"""Where rewards come from: a reward model, a Python function, an HTTP endpoint, or a judge that compares.

Each gives one finite number per response, or an error that names the response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.base.address import is_address, redacted
from trainer.data.chat import ends
from trainer.data.encoding import encode_pairs
from trainer.data.packing import Sample, pack, within_budget
from trainer.data.prompt import asked
from trainer.data.tokenizer import decode, same
from trainer.models.loading import load_scalar
from trainer.models.policy import ScalarModel
from trainer.rewards.compare import COMPARE, by_comparison
from trainer.rewards.http import endpoint
from trainer.rewards.names import RewardFunction, function_of, is_model
from trainer.sampling.rollout import Rollout

Reward = Callable[[Rollout, Sequence[dict[str, Any]]], Tensor]
"""Of a rollout and its prompts' records: [S] float32 scores."""


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


def _from_model(
    model: ScalarModel, name: str, tokenizer: Any, *, max_length: int, max_tokens: int, device: torch.device
) -> Reward:
    # A model of ours that reads as the policy does takes its tokens. Otherwise text is the common language: the model
    # reads the conversation as its own tokenizer and template have it, within its own limit.
    own, limit = model.own, model.within(max_length)
    shared = own and limit == max_length and same(model.tokenizer, tokenizer)
    rows, pad = model.model.get_input_embeddings().weight.shape[0], model.model.config.pad_token_id
    end = ends(model.tokenizer)[-1]  # the template's, if there is one

    def read_by(sample: Sample) -> Sample:
        """The tokens up to the one at which the model's own forward scores."""
        last = len(sample.tokens)
        while not own and last > 1 and sample.tokens[last - 1] == pad:
            last -= 1
        return Sample(sample.tokens[:last], sample.prompt_length)

    @torch.no_grad()
    def score(rollout: Rollout, records: Sequence[dict[str, Any]]) -> Tensor:
        samples = rollout.samples
        if not shared:
            prompts, ended = [r["prompt"] for r in records], [not t for t in rollout.truncated]
            said = responses_of(rollout, tokenizer)
            samples = encode_pairs(model.tokenizer, prompts, said, limit, ended, whole=not own)
        else:  # Of several ends the model has learnt one.
            samples = [s if cut else with_end(s, end) for s, cut in zip(samples, rollout.truncated, strict=True)]
        samples = [read_by(sample) for sample in samples]
        if (largest := max(max(s.tokens) for s in samples)) >= rows:
            raise ValueError(f"reward: {name} has {rows} rows of embeddings, and a response holds the id {largest}")
        parts = within_budget([len(s.tokens) for s in samples], max_tokens)
        scores = torch.cat([model.scores(pack([samples[i] for i in part], device)) for part in parts])
        if not bool(scores.isfinite().all()):
            at = int((~scores.isfinite()).nonzero()[0])
            _refuse(name, float(scores[at]), records[at]["prompt"], responses_of(rollout, tokenizer)[at])
        return scores

    return score


def with_end(sample: Sample, end: int) -> Sample:
    """The same with another last token."""
    return Sample([*sample.tokens[:-1], end], sample.prompt_length)


def _from_function(function: RewardFunction, name: str, tokenizer: Any, *, alone: bool = True) -> Reward:
    """``alone``: whether the function can be asked about one sample, to find the one at which it fails."""

    def score(rollout: Rollout, records: Sequence[dict[str, Any]]) -> Tensor:
        responses = responses_of(rollout, tokenizer)
        prompts, extras = [asked(r["prompt"]) for r in records], [r.get("extra", {}) for r in records]
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
    """Responses as text, without special tokens and without the one that ends them."""
    return decode(tokenizer, [rollout.said(i) for i in range(len(rollout.samples))])
