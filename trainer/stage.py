"""What all stages share: configuration, optimizer and schedule, micro-batches under one denominator, the guard."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

import rlhf_kernels as rk
from trainer.models import Policy, ScalarModel, load_policy, load_scalar, scalar_from
from trainer.tiny import byte_tokenizer, tiny_policy

T = TypeVar("T")
MAX_SKIPS = 3


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Options of every stage."""

    model: str = "tiny"
    """A local directory or hub id of a causal language model, or "tiny": a small Llama from scratch."""
    data: Path
    """Training data, .jsonl or .jsonl.gz."""
    out: Path = Path("runs/latest")
    """Folder for the trained model, the metrics and the report."""
    seed: int = 0
    """Two runs with one seed on one machine give the same bits."""
    steps: int = 300
    """Optimizer steps; in ppo, rollouts."""
    batch_size: int = 64
    """Records per step: demonstrations, groups of ranked responses, or prompts."""
    max_tokens: int = 8192
    """Tokens per micro-batch. It bounds memory and does not change the result."""
    max_length: int = 1024
    """Longest sequence; longer prompts are cut on the left, longer responses on the right."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up: not at all, or to a tenth of its peak."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices only."""
    adam_eps: float = 1e-8
    """Added to the denominator of Adam."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto is the GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights and optimizer stay in float32."""
    quiet: bool = False
    """Show no progress."""


class Optimizer:
    """AdamW for one model, with its schedule, clipping and a guard against gradients that are not finite."""

    def __init__(self, cfg: StageConfig, model: nn.Module, total_steps: int, lr: float | None = None) -> None:
        self.cfg, self.total_steps, self.peak = cfg, total_steps, cfg.lr if lr is None else lr
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.95), eps=cfg.adam_eps, fused=True)
        self.taken = self.skipped = self.skipped_in_a_row = 0

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        warm = min(1.0, (self.taken + 1) / max(self.cfg.warmup_steps, 1))
        span = max(self.total_steps - self.cfg.warmup_steps, 1)
        done = min(max(self.taken - self.cfg.warmup_steps, 0) / span, 1.0)
        fall = {"constant": 1.0, "linear": 1 - 0.9 * done, "cosine": 0.55 + 0.45 * math.cos(math.pi * done)}
        return self.peak * warm * fall[self.cfg.schedule]

    def step(
        self, batches: Sequence[T], loss: Callable[[T], rk.LossOutput], weights: Sequence[float]
    ) -> dict[str, float]:
        """One step over micro-batches.

        Args:
            batches: Micro-batches; gradients add up over them.
            loss: Gives the loss of a micro-batch under the denominator of the whole step, so that losses add up too.
            weights: What each micro-batch counts in the averages of the other metrics: its tokens, groups or pairs.

        Returns:
            ``loss``, the metrics, ``grad_norm``, ``lr`` and ``skipped`` (steps so far whose gradient was not finite).

        Raises:
            FloatingPointError: After three such steps in a row.
        """
        sums: dict[str, float] = {}
        total = 0.0
        for batch, weight in zip(batches, weights, strict=True):
            out = loss(batch)
            out.loss.backward()
            total += float(out.loss.detach())
            for name, x in out.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(x) * weight
        norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)
        lr = self.lr
        for group in self.adam.param_groups:
            group["lr"] = lr
        finite = bool(torch.isfinite(norm))
        if finite:
            self.adam.step()
        self.adam.zero_grad()
        self.taken += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPS:
            raise FloatingPointError(f"the gradient was not finite in {MAX_SKIPS} steps in a row; try a lower lr")
        averages = {name: x / max(sum(weights), 1e-9) for name, x in sums.items()}
        return averages | {"loss": total, "grad_norm": float(norm), "lr": lr, "skipped": float(self.skipped)}


def prepare(cfg: StageConfig) -> torch.device:
    """Checks the configuration, seeds every generator and picks the device."""
    for name in ("steps", "batch_size", "max_tokens", "max_length"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want at least 1")
    if not cfg.lr > 0:
        raise ValueError(f"lr: got {cfg.lr}, want a positive number")
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if cfg.device == "auto" else cfg.device)


def generator(cfg: StageConfig, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own, so that one use of randomness does not shift another."""
    return torch.Generator(device).manual_seed(cfg.seed * 1000 + stream)


def policy_for(cfg: StageConfig, texts: Sequence[str], device: torch.device) -> Policy:
    """The model of the configuration; a tiny one learns its tokenizer from ``texts``."""
    policy = tiny_policy(byte_tokenizer(texts), cfg.seed) if cfg.model == "tiny" else load_policy(cfg.model)
    return policy.to(device)


def scalar_for(cfg: StageConfig, path: str, texts: Sequence[str], device: torch.device) -> ScalarModel:
    """A model with a scalar head from ``path``, which may also be "tiny"."""
    random_head = generator(cfg, 7)
    if path == "tiny":
        return scalar_from(policy_for(cfg, texts, torch.device("cpu")), random_head).to(device)
    return load_scalar(path, random_head).to(device)


def autocast(cfg: StageConfig, device: torch.device) -> torch.autocast:
    """The precision of the configuration, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices without end: a new permutation for every pass, each record once per pass."""
    source = random.Random(seed)
    pool: list[int] = []
    while True:
        while len(pool) < batch_size:
            pool += source.sample(range(count), count)
        yield pool[:batch_size]
        pool = pool[batch_size:]
