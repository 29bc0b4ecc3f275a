"""Replies that are known beforehand, as packed micro-batches, with what a frozen reference thinks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.packing import Packed, Sample, pack, within_budget
from trainer.stages.preference.reference import Reference

Unit = tuple[int, ...]
"""Samples that stay together in a micro-batch, in this order."""


@dataclass(frozen=True)
class Replies:
    """Token sequences of a whole file. What belongs together, the two replies of a pair, is one unit."""

    samples: list[Sample]
    good: list[bool]  # per sample: the chosen one of a pair, or a desirable one
    units: list[Unit]


class ReplyTotals(NamedTuple):
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
    totals: ReplyTotals  # of this micro-batch alone


def parts_of(
    replies: Replies,
    units: Sequence[Unit],
    reference: Reference | None,
    max_tokens: int,
    device: torch.device | str,
) -> list[Part]:
    """Micro-batches of whole units, at most ``max_tokens`` tokens each."""
    parts = []
    for chosen in within_budget([sum(len(replies.samples[i].tokens) for i in u) for u in units], max_tokens):
        indices = [i for k in chosen for i in units[k]]
        samples, good = [replies.samples[i] for i in indices], [replies.good[i] for i in indices]
        packed = pack(samples, device)
        ref_logp = None if reference is None else reference.logp(indices, packed)
        tokens = sum(len(s.tokens) - max(s.prompt_length, 1) for s, g in zip(samples, good, strict=True) if g)
        totals = ReplyTotals(len(chosen), sum(good), tokens)
        parts.append(Part(packed, ref_logp, torch.tensor(good, device=device), totals))
    return parts


def totals_of(parts: Sequence[Part]) -> ReplyTotals:
    """Denominators of a step made of these micro-batches."""
    return ReplyTotals(*(sum(column) for column in zip(*(p.totals for p in parts), strict=True)))
