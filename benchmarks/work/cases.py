"""Batches that look like the work: peaked logits, sampled targets, prompts, clipped and useless tokens.

Legend: N tokens, H hidden, V vocabulary, S sequences, packed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.work.truth import Truth, truth_of

CLIP = (0.2, 0.2)  # of the policy losses
DUAL_CLIP = 3.0  # Liger's bound of a ratio under a negative advantage; no ratio of these batches comes near it
BETA = 0.1  # of the preference losses
KTO_KL = 0.3  # nats, the reference point of KTO
UNIFORM = math.inf  # mean entropy of a head that knows nothing
PREFERENCES = ("dpo", "dpo_prompts", "ipo", "kto")
HEAD_OPS = (
    "train", "score", "grpo", "grpo_groups", "dpo", "dpo_prompts", "ipo", "kto", "orpo", "sft", "kl", "logits",
    "sparse", "sparse_kept",
)  # fmt: skip
# Users of a peer would do the same: only rows that count meet its head.
COMPACTED = ("grpo_groups", "ipo", "kto", "orpo", "sft", "sparse_kept")


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    sequences: int = 8
    ragged: bool = False  # sequences of different lengths, as real replies

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocab}"

    def lengths(self) -> Tensor:
        if not self.ragged:
            return torch.full((self.sequences,), self.tokens // self.sequences)
        share = torch.linspace(0.3, 1.7, self.sequences)[torch.arange(self.sequences) * 3 % self.sequences]
        cuts = (share.cumsum(0) / share.sum() * self.tokens).round().long()
        return cuts.diff(prepend=torch.zeros(1, dtype=torch.long))


SHAPES = {"tiny": Shape(64, 32, 1000), "small": Shape(1024, 512, 32000), "large": Shape(1024, 896, 151936)}
MODELS = {  # hidden size and vocabulary; none of them caps its logits
    "qwen2.5-0.5b": (896, 151936),
    "llama-3.2-1b": (2048, 128256),
    "qwen3-1.7b": (2048, 151936),
    "gemma-3-4b": (2560, 262208),
    "llama-3-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
    "qwen2.5-14b": (5120, 152064),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shape_of(name: str, tokens: int | None = None) -> Shape:
    """A shape by its own name or its model's; those of models are ragged."""
    if name in MODELS:
        return Shape(tokens or 1024, *MODELS[name], ragged=True)
    return SHAPES[name] if tokens is None else replace(SHAPES[name], tokens=tokens)


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
    logits: Tensor | None = None  # [N, V] in the dtype of the head

    @property
    def segments(self) -> Tensor:
        """[N] which sequence each token is of."""
        lengths = self.cu_seqlens.diff()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

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


def draw(
    shape: Shape, dtype: torch.dtype, nats: float = 0.5, seed: int = 0, device: str = "cpu"
) -> tuple[Batch, Truth]:
    """A batch whose next-token distributions have this mean entropy, and the truth about it.

    Logits have standard deviation 2.5 and one token that stands out, by more in some rows than in others: as in a
    trained model, most rows are all but certain, a few wide open, and no logit is larger than about 40. One target in
    ten is the argmax, the others are sampled. ``UNIFORM`` is a head that has learned next to nothing. The numbers are
    drawn on the device: a processor draws a large head for minutes.
    """
    rng = torch.Generator().manual_seed(seed)
    there: Any = {"generator": rng if device == "cpu" else torch.Generator(device).manual_seed(seed), "device": device}
    weight = torch.randn(shape.vocab, shape.hidden, **there).mul_(shape.hidden**-0.5).to(dtype)
    background = 2.5 * torch.randn(shape.tokens, shape.hidden, **there)
    if nats == UNIFORM:
        hidden = background.mul_(0.1).to(dtype)
    else:
        tops = torch.randint(shape.vocab, (shape.tokens,), **there)
        few = min(64, shape.tokens)  # rows that stand for all: sharpness repeats after them
        grid = torch.linspace(0.6, 1.4, few)[torch.randperm(few, generator=rng)].to(device)
        standing_out = grid.repeat(-(-shape.tokens // few))[: shape.tokens, None] * weight[tops].float()
        head = weight.float().t()
        lift = _lift_for_entropy(background[:few] @ head, standing_out[:few] @ head, nats)
        hidden = (background + lift * standing_out).to(dtype)
    return packed(hidden, weight, None, shape.lengths(), rng)


def packed(
    hidden: Tensor, weight: Tensor, targets: Tensor | None, lengths: Tensor, rng: torch.Generator
) -> tuple[Batch, Truth]:
    """A batch of these sequences and the truth about it; targets are sampled where none are given."""
    targets, truth = truth_of(hidden, weight, targets, rng)
    device, n = hidden.device, len(hidden)
    batch = Batch(
        hidden=hidden,
        weight=weight,
        targets=targets,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device),
        advantages=torch.randn(n, generator=rng).to(device),
        old_logp=truth.logp.float(),
        kept=torch.ones(n, dtype=torch.bool, device=device),
    )
    return batch, truth


def for_op(op: str, batch: Batch, truth: Truth, seed: int = 1) -> tuple[Batch, Truth | None]:
    """The batch of an op, and the truth about its reference where it has one.

    No log-ratio stands within 0.13 of the edge of the clip: on which side a rounded log-probability falls would be
    decided by a coin, and with it which rows have a gradient.
    """
    rng = torch.Generator().manual_seed(seed)
    n, s, device = batch.targets.numel(), batch.cu_seqlens.numel() - 1, batch.hidden.device
    near = torch.empty(n).uniform_(-0.08, 0.05, generator=rng).to(device)
    if op in ("grpo", "grpo_groups"):
        far = torch.empty(n).uniform_(0.35, 0.5, generator=rng) * torch.randn(n, generator=rng).sign()
        log_ratio = torch.where(torch.rand(n, generator=rng).to(device) < 0.2, far.to(device), near)
        per_sequence = torch.randn(s, generator=rng)
        per_sequence = (per_sequence - per_sequence.mean()) / per_sequence.std()
        if op == "grpo_groups":  # in every second group of four all replies had the same reward
            per_sequence[torch.arange(s) // 4 % 2 == 1] = 0.0
            batch = replace(batch, kept=_without_prompts(batch))
        spread = per_sequence.to(device)[batch.segments]
        return replace(batch, advantages=spread, old_logp=truth.logp.float() - log_ratio), None
    if op in (*PREFERENCES, "kl"):
        noise = torch.randn(batch.hidden.shape, generator=rng).to(device)
        moved = batch.hidden + 0.1 * batch.hidden.std() * noise
        ref_hidden, ref_weight = moved.to(batch.hidden.dtype), batch.weight.clone()
        _, ref_truth = truth_of(ref_hidden, ref_weight, batch.targets, rng)
        batch = replace(batch, ref_hidden=ref_hidden, ref_weight=ref_weight)
        if op != "dpo":
            batch = replace(batch, kept=_without_prompts(batch, replies=1 if op == "kl" else 2))
        return batch, ref_truth
    if op in ("orpo", "sft"):
        return replace(batch, kept=_without_prompts(batch, replies=2 if op == "orpo" else 1)), None
    if op == "logits":
        return replace(batch, logits=batch.hidden @ batch.weight.t()), None
    if op in ("sparse", "sparse_kept"):
        kept = _without_prompts(batch)
        useless = torch.randperm(int(kept.sum()), generator=rng)[: int(0.3 * kept.sum())].to(device)
        advantages = batch.advantages.clone()
        advantages[kept.nonzero().squeeze(1)[useless]] = 0.0
        return replace(batch, kept=kept, advantages=advantages, old_logp=truth.logp.float() - near), None
    return batch, None


def _without_prompts(batch: Batch, replies: int = 1) -> Tensor:
    """[N] bool: not the prompt. Prompts have different lengths, half of all tokens together where replies are equally
    long; this many neighbours follow the same prompt."""
    lengths = batch.cu_seqlens.diff().cpu()
    groups = lengths.view(-1, replies).amin(1)
    share = torch.linspace(0.25, 0.75, len(groups))
    prompts = (groups * share).round().long().repeat_interleave(replies)
    position = torch.arange(int(lengths.sum())) - batch.cu_seqlens[:-1].cpu().repeat_interleave(lengths)
    return (position >= prompts.repeat_interleave(lengths)).to(batch.hidden.device)
