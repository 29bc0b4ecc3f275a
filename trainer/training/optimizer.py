"""AdamW for one model, with its schedule, clipping and a guard against losses that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

import rlhf_kernels as rk
from trainer.run.not_finite import NOT_FINITE, NotFinite, save_batch
from trainer.run.stops import stop_signals
from trainer.training.gradients import Terms, accumulate
from trainer.training.options import StageConfig
from trainer.training.schedule import learning_rate

T = TypeVar("T")

MAX_SKIPS = 3


class Optimizer:
    """AdamW for one model, with its schedule, clipping and a guard against losses and gradients that are not finite."""

    def __init__(
        self, cfg: StageConfig, model: nn.Module, total_steps: int, lr: float | None = None, name: str = "model"
    ) -> None:
        self.cfg, self.total_steps, self.name = cfg, total_steps, name
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
        return learning_rate(
            self.taken, peak=self.peak, warmup=self.cfg.warmup_steps, total=self.total_steps, kind=self.cfg.schedule
        )

    def step(
        self, batches: Sequence[T], loss: Callable[[T], rk.LossOutput | Terms], weights: Sequence[float]
    ) -> dict[str, float]:
        """One step over micro-batches.

        Args:
            batches: Micro-batches; gradients add up over them.
            loss: Gives the loss of a micro-batch under the denominator of the whole step, so that losses add up too.
            weights: What each micro-batch counts in the averages of the other metrics: its tokens, groups or pairs.

        Returns:
            ``loss``, its terms and the metrics, ``grad_norm``, ``lr`` and ``skipped`` (steps so far whose loss or
            gradient was not finite; they change nothing but the schedule).

        Raises:
            NotFinite: After three such steps in a row; the batch is saved in the run folder.
        """
        with stop_signals.interruptible():
            found = accumulate(self.parameters, batches, loss, weights, self.cfg.max_grad_norm)
        lr = self.lr
        for group in self.adam.param_groups:
            group["lr"] = lr
        if found.finite:
            self.adam.step()
        self.taken += 1
        self.skipped += not found.finite
        self.skipped_in_a_row = 0 if found.finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPS:
            self._give_up(batches, found.losses, found.norm)
        self.adam.zero_grad()
        return found.metrics | {"loss": found.loss, "grad_norm": found.norm, "lr": lr, "skipped": float(self.skipped)}

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
