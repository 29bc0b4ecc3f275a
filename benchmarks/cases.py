"""Batches that look like the work: peaked logits, sampled targets, prompts, clipped and useless tokens.

Legend: N tokens, H hidden, V vocabulary, S sequences of N/S tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from benchmarks.truth import Truth, truth_of

CLIP = (0.2, 0.2)  # of the policy losses
BETA = 0.1  # of the preference loss
HEAD_OPS = ("train", "score", "grpo", "dpo", "dpo_prompts", "sparse", "sparse_kept")


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    sequences: int = 8

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocab}"


SHAPES = {"tiny": Shape(64, 32, 1000), "small": Shape(1024, 512, 32000), "large": Shape(1024, 896, 151936)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """What a contender is given. Sequences are packed; preference pairs are neighbours, chosen first."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    cu_seqlens: Tensor  # [S+1]
    advantages: Tensor  # [N] float32
    old_logp: Tensor  # [N] float32
    kept: Tensor  # [N] bool, false on the prompt
    ref_hidden: Tensor | None = None  # [N, H]
    ref_weight: Tensor | None = None  # [V, H]

    def save(self, path: str) -> None:
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @staticmethod
    def load(path: str) -> Batch:
        return Batch(**torch.load(path, weights_only=True))


def _lift_for_entropy(logits: Tensor, lifted: Tensor, nats: float) -> float:
    """The factor of ``lifted`` that gives ``logits`` plus it this mean entropy, which falls as the factor grows."""
    low, high = 0.0, 60.0
    for _ in range(25):
        middle = (low + high) / 2
        logp = torch.add(logits, lifted, alpha=middle).log_softmax(-1)
        low, high = (middle, high) if -(logp.exp() * logp).sum(-1).mean() > nats else (low, middle)
    return low


def draw(shape: Shape, dtype: torch.dtype, nats: float = 0.5, seed: int = 0) -> tuple[Batch, Truth]:
    """A batch whose next-token distributions have this mean entropy, and the truth about it.

    Logits have standard deviation 2.5 and one token that stands out, by more in some rows than in others: as in a
    trained model, most rows are all but certain, a few wide open, and no logit is larger than about 40. One target in
    ten is the argmax, the others are sampled.
    """
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.vocab, shape.hidden, generator=rng).mul_(shape.hidden**-0.5).to(dtype)
    background = 2.5 * torch.randn(shape.tokens, shape.hidden, generator=rng)
    tops = torch.randint(shape.vocab, (shape.tokens,), generator=rng)
    few = min(64, shape.tokens)  # rows that stand for all: sharpness repeats after them
    grid = torch.linspace(0.6, 1.4, few)[torch.randperm(few, generator=rng)]
    standing_out = grid.repeat(shape.tokens // few)[:, None] * weight[tops].float()
    head = weight.float().t()
    lift = _lift_for_entropy(background[:few] @ head, standing_out[:few] @ head, nats)
    hidden = (background + lift * standing_out).to(dtype)
    targets, truth = truth_of(hidden, weight, None, rng)
    length = shape.tokens // shape.sequences
    batch = Batch(
        hidden=hidden,
        weight=weight,
        targets=targets,
        cu_seqlens=torch.arange(0, shape.tokens + 1, length),
        advantages=torch.randn(shape.tokens, generator=rng),
        old_logp=truth.logp.float(),
        kept=torch.ones(shape.tokens, dtype=torch.bool),
    )
    return batch, truth


def for_op(op: str, batch: Batch, truth: Truth, seed: int = 1) -> tuple[Batch, Truth | None]:
    """The batch of an op, and the truth about its reference where it has one.

    No log-ratio stands within 0.13 of the edge of the clip: on which side a rounded log-probability falls would be
    decided by a coin, and with it which rows have a gradient.
    """
    rng = torch.Generator().manual_seed(seed)
    n, s = batch.targets.numel(), batch.cu_seqlens.numel() - 1
    near = torch.empty(n).uniform_(-0.08, 0.05, generator=rng)
    if op == "grpo":
        far = torch.empty(n).uniform_(0.35, 0.5, generator=rng) * torch.randn(n, generator=rng).sign()
        log_ratio = torch.where(torch.rand(n, generator=rng) < 0.2, far, near)
        per_sequence = torch.randn(s, generator=rng)
        per_sequence = (per_sequence - per_sequence.mean()) / per_sequence.std()
        spread = per_sequence.repeat_interleave(n // s)
        return replace(batch, advantages=spread, old_logp=truth.logp.float() - log_ratio), None
    if op in ("dpo", "dpo_prompts"):
        moved = batch.hidden + 0.1 * batch.hidden.std() * torch.randn(batch.hidden.shape, generator=rng)
        ref_hidden, ref_weight = moved.to(batch.hidden.dtype), batch.weight.clone()
        _, ref_truth = truth_of(ref_hidden, ref_weight, batch.targets, rng)
        batch = replace(batch, ref_hidden=ref_hidden, ref_weight=ref_weight)
        if op == "dpo_prompts":  # the two replies of a pair follow the same prompt
            prompts = _prompt_lengths(s // 2, n // s).repeat_interleave(2)
            batch = replace(batch, kept=torch.arange(n) % (n // s) >= prompts.repeat_interleave(n // s))
        return batch, ref_truth
    if op in ("sparse", "sparse_kept"):
        prompts = _prompt_lengths(s, n // s)
        position = torch.arange(n) % (n // s)
        kept = position >= prompts.repeat_interleave(n // s)
        useless = torch.randperm(int(kept.sum()), generator=rng)[: int(0.3 * kept.sum())]
        advantages = batch.advantages.clone()
        advantages[kept.nonzero().squeeze(1)[useless]] = 0.0
        return replace(batch, kept=kept, advantages=advantages, old_logp=truth.logp.float() - near), None
    return batch, None


def _prompt_lengths(sequences: int, length: int) -> Tensor:
    """Different lengths, half of all tokens together."""
    offsets = torch.linspace(-length / 4, length / 4, sequences).round().long()
    return length // 2 + offsets
