"""A small cached sampler. It hands out token ids, integer lengths and a truncation flag, and no text decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer.base import ranks
from trainer.data.packing import Packed, Sample, pack
from trainer.models.policy import Policy
from trainer.sampling.generate import generated
from trainer.sampling.nucleus import nucleus


@dataclass(frozen=True)
class Rollout:
    """What the sampler did, in the order of the prompts."""

    samples: list[Sample]
    truncated: list[bool]  # stopped by the length limit, not by a token that ends a response
    sampler_logp: list[list[float]]  # per response token, as the sampler saw it

    def response(self, i: int) -> list[int]:
        """Tokens of response i, the one that ends it included where there is one."""
        return self.samples[i].tokens[self.samples[i].prompt_length :]

    def said(self, i: int) -> list[int]:
        """Those without the one that ends it."""
        return self.response(i) if self.truncated[i] else self.response(i)[:-1]

    def pack(self, device: torch.device | str) -> Packed:
        return pack(self.samples, device)

    def logp_of(self, packed: Packed) -> Tensor:
        """The sampler's log-probabilities in the rows of ``packed``, [N] float32; zero where there is no target."""
        mine = torch.tensor([x for logps in self.sampler_logp for x in logps])
        rows = torch.zeros(packed.mask.shape).masked_scatter_(packed.mask.cpu(), mine)
        return rows.to(packed.mask.device)

    def sampler_delta(self, packed: Packed, logp: Tensor) -> float:
        """Largest difference between the sampler's log-probabilities and those of the training forward, [N]."""
        return float((logp - self.logp_of(packed))[packed.mask].abs().max())


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    sampler: Literal["cached", "generate"] = "cached",
    batch_size: int = 512,
) -> Rollout:
    """Samples one response per prompt, by default from the full distribution, so that nothing biases a ratio.

    Args:
        policy: It names the tokens that end a response.
        prompts: Token ids, none of them empty.
        max_new_tokens: A response that has not ended by then is truncated.
        generator: Source of randomness, on the policy's device. The first batch draws from it, and each other one from
            a generator of its own that it seeds, so that no batch needs to know of another.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Samples from the fewest tokens that hold at least this mass; log-probabilities are then of that choice.
        sampler: Our own, or transformers' ``generate``; they draw other random numbers from one distribution.
        batch_size: Prompts in flight together. Prompts of similar length share a batch, and ranks share the batches;
            the result does not depend on their number.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("prompts: want at least one, and none of them empty")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chunks = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    seeds = torch.randint(2**62, (len(chunks) - 1,), generator=generator, device=generator.device).tolist()
    sources = [generator, *(torch.Generator(generator.device).manual_seed(seed) for seed in seeds)]
    ends, run = set(policy.ends), _continue if sampler == "cached" else generated

    def sampled(part: tuple[list[int], torch.Generator]) -> tuple[list[tuple[list[int], list[float]]], Tensor]:
        """Responses with their log-probabilities, and what has become of the generator."""
        chunk, source = part
        tokens, chosen = run(policy, [prompts[i] for i in chunk], max_new_tokens, source, temperature, top_p)
        lengths = [next((t + 1 for t, x in enumerate(row) if x in ends), len(row)) for row in tokens.tolist()]
        rows = zip(tokens.tolist(), chosen.tolist(), lengths, strict=True)
        return [(row[:length], logp[:length]) for row, logp, length in rows], source.get_state()

    found = ranks.spread(zip(chunks, sources, strict=True), sampled)
    generator.set_state(found[0][1])  # of the rank that had the first batch
    said = {i: row for chunk, (rows, _) in zip(chunks, found, strict=True) for i, row in zip(chunk, rows, strict=True)}
    responses, logps = [said[i][0] for i in range(len(prompts))], [said[i][1] for i in range(len(prompts))]
    samples = [Sample(list(p) + r, len(p)) for p, r in zip(prompts, responses, strict=True)]
    return Rollout(samples, [r[-1] not in ends for r in responses], logps)


def _continue(
    policy: Policy,
    prompts: list[list[int]],
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """Responses [B, T] (end-of-sequence beyond their end) and log-probabilities [B, T]."""
    device, eos, ends = policy.weight.device, policy.ends[0], policy.ends
    longest = max(map(len, prompts))
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[eos] * (longest - len(p)) + p for p in prompts], device=device)
    # Padding is known from lengths. Without any there is no mask, and attention is cheaper.
    windowed = getattr(policy.model.config, "sliding_window", None) is not None
    mask = torch.arange(longest, device=device) >= pad[:, None] if windowed or bool(pad.any()) else None
    position = (torch.arange(longest, device=device) - pad[:, None]).clamp(min=0)

    out = torch.full((len(prompts), max_new_tokens), eos, device=device)
    logp = torch.zeros(len(prompts), max_new_tokens, device=device)
    alive = torch.arange(len(prompts), device=device)  # rows that are still being written
    cache = DynamicCache(config=policy.model.config)
    for t in range(max_new_tokens):
        hidden = policy.states(
            input_ids=ids, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True
        )[:, -1]
        scores = torch.log_softmax(policy.logits(hidden) / (temperature or 1.0), -1)
        if top_p < 1:
            scores = nucleus(scores, top_p)
        if temperature == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.exp(), 1, generator=generator)
        out[alive, t] = token.squeeze(1)
        logp[alive, t] = scores.gather(1, token).squeeze(1)
        ids, position = token, position[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        going = torch.stack([token.squeeze(1) != end for end in ends]).all(0)
        count = int(going.sum())
        if count == 0:
            break
        if count <= 0.75 * len(alive):  # finished rows are carried along until enough of them are worth a copy
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            alive, ids, position = alive[keep], ids[keep], position[keep]
            mask = None if mask is None else mask[keep]
    return out, logp
