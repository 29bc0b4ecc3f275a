"""Replies that are known beforehand, as packed micro-batches, with what a frozen reference thinks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.models import Policy, frozen, load_policy
from trainer.packing import Packed, Sample, pack, split
from trainer.stage import StageConfig, autocast

Unit = tuple[int, ...]
"""Samples that stay together in a micro-batch, in this order."""


@dataclass(frozen=True)
class Replies:
    """Token sequences of a whole file. What belongs together, the two replies of a pair, is one unit."""

    samples: list[Sample]
    good: list[bool]  # per sample: the chosen one of a pair, or a desirable one
    units: list[Unit]


class Totals(NamedTuple):
    """Denominators of one step, known before its first micro-batch."""

    units: int
    good: int  # good replies
    tokens: int  # of the good replies


@dataclass(frozen=True)
class Part:
    """One micro-batch. Of pairs, sequence 2i is the chosen and 2i + 1 the rejected reply."""

    packed: Packed
    ref_logp: Tensor | None  # [N], where there is a reference
    good: Tensor  # [S] bool
    totals: Totals  # of this micro-batch alone


class Reference:
    """Log-probabilities under a frozen model: scored once, after which the model is let go, or whenever asked for.

    Args:
        cfg: Token budget and precision.
        model: The reference.
        samples: All replies that will ever be asked for.
        once: Score them now. Costs four bytes per reply token, and saves a forward per step and the model's memory.
    """

    def __init__(self, cfg: StageConfig, model: Policy, samples: Sequence[Sample], *, once: bool) -> None:
        self.cfg, self.model = cfg, None if once else model
        self.known: list[Tensor] = []  # per sample, at its targets
        if not once:
            return
        device = model.weight.device
        for part in split([len(s.tokens) for s in samples], cfg.max_tokens):
            packed = pack([samples[i] for i in part], device)
            logp, mask = self._score(model, packed).cpu(), packed.mask.cpu()
            self.known += [x[m] for x, m in zip(logp.split(packed.lengths), mask.split(packed.lengths), strict=True)]

    def logp(self, indices: Sequence[int], packed: Packed) -> Tensor:
        """[N], zero where there is no target; ``packed`` holds the samples ``indices``, in this order."""
        if self.model is not None:
            return self._score(self.model, packed)
        known, mask = torch.cat([self.known[i] for i in indices]), packed.mask
        return torch.zeros(mask.shape).masked_scatter_(mask.cpu(), known).to(mask.device)

    @torch.no_grad()
    def _score(self, model: Policy, packed: Packed) -> Tensor:
        with autocast(self.cfg, packed.input_ids.device):
            return model.stats(packed).logp


def reference_model(policy: Policy, path: str | None) -> Policy:
    """The model at ``path``, or by default the policy as it is now; it takes no gradients.

    Raises:
        ValueError: Its tokens are not those of the policy, so that its log-probabilities would be of other texts.
    """
    if path is None:
        return frozen(policy)
    model = load_policy(path).to(policy.weight.device).requires_grad_(False)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"reference: want the tokenizer of the policy, {path} has another")
    return model


def parts_of(
    replies: Replies,
    units: Sequence[Unit],
    reference: Reference | None,
    max_tokens: int,
    device: torch.device | str,
) -> list[Part]:
    """Micro-batches of whole units, at most ``max_tokens`` tokens each."""
    parts = []
    for chosen in split([sum(len(replies.samples[i].tokens) for i in u) for u in units], max_tokens):
        indices = [i for k in chosen for i in units[k]]
        samples, good = [replies.samples[i] for i in indices], [replies.good[i] for i in indices]
        packed = pack(samples, device)
        ref_logp = None if reference is None else reference.logp(indices, packed)
        tokens = sum(len(s.tokens) - max(s.prompt_length, 1) for s, g in zip(samples, good, strict=True) if g)
        totals = Totals(len(chosen), sum(good), tokens)
        parts.append(Part(packed, ref_logp, torch.tensor(good, device=device), totals))
    return parts


def totals_of(parts: Sequence[Part]) -> Totals:
    """Denominators of a step made of these micro-batches."""
    return Totals(*(sum(column) for column in zip(*(p.totals for p in parts), strict=True)))
