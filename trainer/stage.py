"""What all stages share: configuration, optimizer and schedule, micro-batches under one denominator, the guard."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import rlhf_kernels as rk
from trainer import ranks
from trainer.chat import Format, settle_date
from trainer.defaults import AUTO, Auto, decided
from trainer.guard import NotFinite, save_batch
from trainer.models import Policy, ScalarModel, Seen, load_policy, load_scalar, scalar_from
from trainer.paths import settle
from trainer.run_folder import NOT_FINITE, refuse_inputs
from trainer.signals import signals
from trainer.tiny import byte_tokenizer, tiny_policy

T = TypeVar("T")
Config = TypeVar("Config", bound="StageConfig")
MAX_SKIPS = 3


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Options of every stage."""

    model: str = "tiny"
    """A local directory or hub id of a causal language model, or "tiny": a small Llama from scratch."""
    data: Path
    """Training data, .jsonl, .jsonl.gz or parquet."""
    out: Path = Path("runs/latest")
    """Folder for the trained model, the metrics and the report."""
    seed: int = 0
    """Two runs with one seed on one machine give the same bits."""
    steps: int = 300
    """Optimizer steps; in ppo, rollouts."""
    batch_size: int = 64
    """Records per step: demonstrations, groups of ranked responses, or prompts."""
    max_tokens: int = 8192
    """Tokens per micro-batch. It bounds memory and does not change the result, but for a router's balancing loss."""
    max_length: int = 1024
    """Longest sequence; longer prompts are cut on the left, longer responses on the right."""
    prompt_format: Format = "auto"
    """How to read a prompt that is plain text. auto: as one message of the user if the model has a chat template, else
    as it stands. chat: as a message of the user, and a model without a template is refused. raw: as it stands, for
    prompts that already hold a template's markup."""
    template_date: str | None = None
    """Date that a chat template puts into prompts (YYYY-MM-DD), where it puts one; by default the day a run begins."""
    lr: Auto[float] = AUTO
    """Peak learning rate. Here and below, "auto" is what suits the model, small and from scratch or pretrained; a run
    begins by saying what it became."""
    warmup_steps: Auto[int] = AUTO
    """Steps over which the learning rate rises from zero."""
    schedule: Auto[Literal["constant", "linear", "cosine"]] = AUTO
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
    save_every: int | None = None
    """Steps between checkpoints; None saves every ten minutes. A run that is told to stop saves in any case."""
    keep_last: int = 2
    """Checkpoints that stay, each as large as the models with their optimizers; none stays once the run is finished."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        settle(self)
        settle_date(self)


@dataclass(frozen=True, kw_only=True)
class TokenConfig(StageConfig):
    """Options of every stage whose loss meets the language-model head."""

    tolerance: float | None = None
    """Share of their gradient that logits may lose for speed, such as 0.0002; by default nothing is left out."""


class Optimizer:
    """AdamW for one model, with its schedule, clipping and a guard against losses and gradients that are not finite."""

    def __init__(
        self, cfg: StageConfig, model: nn.Module, total_steps: int, lr: float | None = None, name: str = "model"
    ) -> None:
        self.cfg, self.total_steps, self.name = (cfg := decided(cfg)), total_steps, name
        self.peak = cfg.lr if lr is None else lr
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.95), eps=cfg.adam_eps, fused=True)
        self.taken = self.skipped = self.skipped_in_a_row = 0

    def counters(self) -> dict[str, int]:
        """Steps so far: all of them, those that were skipped, and those skipped just now."""
        return {"taken": self.taken, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def tensors(self) -> dict[str, Tensor]:
        """What Adam knows about each parameter, by reference."""
        known = {name: self.adam.state[p] for name, p in self.named.items() if p in self.adam.state}
        return {f"{name}:{key}": x for name, state in known.items() for key, x in state.items()}

    def restore(self, counters: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Takes over from ``counters`` and ``tensors``, which are copied."""
        self.taken, self.skipped = counters["taken"], counters["skipped"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.adam.state.clear()
        for key, x in tensors.items():
            name, _, kind = key.rpartition(":")
            # A copy has the alignment of torch's own memory; what lies in a mapped file may have any.
            self.adam.state[self.named[name]][kind] = x.to(self.named[name].device, copy=True)

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
            ``loss``, the metrics, ``grad_norm``, ``lr`` and ``skipped`` (steps so far whose loss or gradient was not
            finite; they change nothing but the schedule).

        Raises:
            NotFinite: After three such steps in a row; the batch is saved in the run folder.
        """
        sums: dict[str, float] = {}
        losses = [0.0] * len(batches)
        with signals.interruptible():
            for i, (batch, weight) in ranks.share(zip(batches, weights, strict=True)):
                out = loss(batch)
                out.loss.backward()
                losses[i] = float(out.loss.detach())
                for name, x in out.metrics.items():
                    sums[name] = sums.get(name, 0.0) + float(x) * weight
            ranks.sum_gradients(self.parameters)
            sums = ranks.total({"loss": sum(losses), **{f"of/{name}": x for name, x in sums.items()}})
            whole = sums.pop("loss")
            norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)
            finite = bool(torch.isfinite(norm)) and math.isfinite(whole)
        lr = self.lr
        for group in self.adam.param_groups:
            group["lr"] = lr
        if finite:
            self.adam.step()
        self.taken += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPS:
            self._give_up(batches, losses, float(norm))
        self.adam.zero_grad()
        averages = {name.removeprefix("of/"): x / max(sum(weights), 1e-9) for name, x in sums.items()}
        return averages | {"loss": whole, "grad_norm": float(norm), "lr": lr, "skipped": float(self.skipped)}

    def _give_up(self, batches: Sequence[Any], losses: list[float], norm: float) -> NoReturn:
        bad = [n for n, p in self.named.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        self.adam.zero_grad()
        about = {"model": self.name, "step": self.taken, "losses": losses, "grad_norm": norm, "parameters": bad}
        try:
            where = f"is in {save_batch(self.cfg.out / NOT_FINITE, batches, about)}"
        except OSError as error:
            where = f"could not be saved ({error})"
        raise NotFinite(
            f"the loss or the gradient of the {self.name} was not finite in {MAX_SKIPS} steps in a row, which were "
            f"skipped. The last batch {where}. Try a lower lr, or look for odd data in the batch."
        )


def check(cfg: StageConfig) -> None:
    """Refuses numbers without a meaning, once they are decided.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    for name in ("steps", "batch_size", "max_tokens", "max_length", "keep_last"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want at least 1")
    if cfg.save_every is not None and cfg.save_every < 1:
        raise ValueError(f"save_every: got {cfg.save_every}, want at least 1, or None")
    if not (cfg.lr > 0 and math.isfinite(cfg.lr)):
        raise ValueError(f"lr: got {cfg.lr}, want a positive number")
    tolerance = getattr(cfg, "tolerance", None)
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance: got {tolerance}, want a number above 0 and below 1, or None")
    if not cfg.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: got {cfg.max_grad_norm}, want a positive number, or inf for no limit")


def prepare(cfg: StageConfig) -> torch.device:
    """Checks the configuration, seeds every generator and picks the device.

    Raises:
        ValueError: A number has no meaning, or the run would write over what it reads.
    """
    check(cfg)
    refuse_inputs(cfg)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    kind = auto if cfg.device == "auto" else cfg.device
    return torch.device(kind, ranks.local()) if kind == "cuda" and ranks.count() > 1 else torch.device(kind)


def generator(cfg: StageConfig, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own, so that one use of randomness does not shift another."""
    return torch.Generator(device).manual_seed(cfg.seed * 1000 + stream)


def policy_for(cfg: StageConfig, texts: Sequence[str], device: torch.device) -> Policy:
    """The model of the configuration; a tiny one learns its tokenizer from ``texts``."""
    policy = tiny_policy(byte_tokenizer(texts), cfg.seed) if cfg.model == "tiny" else load_policy(cfg.model)
    policy.tolerance = getattr(cfg, "tolerance", None)
    return policy.to(device)


def scalar_for(cfg: StageConfig, path: str, texts: Sequence[str], device: torch.device) -> ScalarModel:
    """A model with a scalar head from ``path``, which may also be "tiny"."""
    random_head = generator(cfg, 7)
    if path == "tiny":
        return scalar_from(policy_for(cfg, texts, torch.device("cpu")), random_head).to(device)
    return load_scalar(path, random_head).to(device)


def fitted(cfg: Config, model: Seen, note: Callable[[str], None]) -> Config:
    """The configuration with its longest sequence brought down to what a model has positions for.

    Args:
        cfg: Of the stage.
        model: That reads the sequences.
        note: Told where that makes a difference.

    Raises:
        ValueError: Nothing is left for a prompt.
    """
    limit, longest = model.limit, getattr(cfg, "max_new_tokens", 0)
    if limit is None or cfg.max_length <= limit:
        return cfg
    if longest >= limit:
        raise ValueError(f"max_new_tokens: got {longest}, want less than the {limit} positions of {cfg.model}")
    note(f"max_length: got {cfg.max_length}, and {cfg.model} has {limit} positions: sequences are cut to {limit}")
    return replace(cfg, max_length=limit)


def autocast(cfg: StageConfig, device: torch.device) -> torch.autocast:
    """The precision of the configuration, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")
