"""Sampling by transformers' own ``generate``, for models whose caches or masks our small sampler does not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from trainer.models.policy import Policy
from trainer.sampling.nucleus import nucleus


class Recorder(LogitsProcessor):
    """Applies temperature and nucleus, and remembers what the tokens that were then drawn had been given.

    Args:
        temperature: Divides the logits; 0 leaves them as they are.
        top_p: See ``nucleus``.
        tokens: Ids that exist; rows of the head beyond them are padding.
    """

    def __init__(self, temperature: float, top_p: float, tokens: int) -> None:
        self.temperature, self.top_p, self.tokens = temperature or 1.0, top_p, tokens
        self.logp: list[Tensor] = []  # [B] per token
        self._last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.drawn(input_ids[:, -1:])
        scores = scores.float() / self.temperature
        scores[:, self.tokens :] = -torch.inf
        self._last = torch.log_softmax(scores, -1)
        if self.top_p < 1:
            self._last = nucleus(self._last, self.top_p)
        return self._last

    def drawn(self, tokens: Tensor) -> None:
        """Notes the log-probabilities of the tokens [B, 1] that were drawn last; at the start there are none."""
        if self._last is not None:
            self.logp.append(self._last.gather(1, tokens).squeeze(1))


@torch.no_grad()
def generated(
    policy: Policy,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """Responses [B, T] (anything beyond their end) and log-probabilities [B, T]; T is that of the longest response."""
    device, eos = policy.weight.device, policy.ends[0]
    longest = max(map(len, prompts))
    ids = torch.tensor([[eos] * (longest - len(p)) + p for p in prompts], device=device)
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= pad[:, None]).long()
    recorder = Recorder(temperature, top_p, policy.tokens)
    options = GenerationConfig(
        do_sample=temperature > 0, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens,
        eos_token_id=policy.ends, pad_token_id=eos, use_cache=True,
    )  # fmt: skip
    # generate draws from the global generator; ours seeds it for this call, and leaves it as it was.
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _own_options(policy, options):
        torch.manual_seed(seed)
        found: Any = policy.model.generate(
            ids, attention_mask=mask, generation_config=options, logits_processor=[recorder]
        )
    recorder.drawn(found[:, -1:])
    return found[:, longest:], torch.stack(recorder.logp, 1)


@contextmanager
def _own_options(policy: Policy, options: GenerationConfig) -> Iterator[None]:
    """What a model suggests for chats (a repetition penalty, say) would fill in whatever ours leaves open."""
    suggested = policy.model.generation_config
    policy.model.generation_config = options
    try:
        yield
    finally:
        policy.model.generation_config = suggested
