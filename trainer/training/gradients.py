"""Gradients of one step: micro-batches add up, ranks add up, and their norm is clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

import rlhf_kernels as rk
from trainer.base import ranks

T = TypeVar("T")
AVERAGE = "average of "  # Metrics that are averaged are told from terms by it while both are summed.


class Terms(NamedTuple):
    """What a micro-batch adds to the loss of its step, as a sum of weighted terms.

    The terms are logged by their names and without their weights. Each is a share under the denominator of the whole
    step, so that the shares of all micro-batches and ranks add up.
    """

    weighted: Mapping[str, tuple[float, Tensor]]
    """Name to weight and term, a scalar."""
    metrics: Mapping[str, Any]
    """Other metrics, which are averaged over the step."""

    @property
    def loss(self) -> Tensor:
        """The sum, which is minimised."""
        found = [term if weight == 1 else weight * term for weight, term in self.weighted.values()]
        return sum(found[1:], start=found[0])


class Gradients(NamedTuple):
    """What is known about a step when its gradients are there."""

    loss: float
    losses: list[float]
    """Of each micro-batch; zero for those of other ranks."""
    norm: float
    """Of the whole gradient, before it was clipped."""
    metrics: dict[str, float]
    """Terms of the loss by name, and averages of the other metrics; the same on every rank."""

    @property
    def finite(self) -> bool:
        """Whether the step can be taken."""
        return math.isfinite(self.norm) and math.isfinite(self.loss)


def accumulate(
    parameters: Sequence[nn.Parameter],
    batches: Sequence[T],
    loss: Callable[[T], rk.LossOutput | Terms],
    weights: Sequence[float],
    max_norm: float,
) -> Gradients:
    """Gradients of a step over its micro-batches, of which each rank takes its share.

    Args:
        parameters: Those that get gradients.
        batches: Micro-batches.
        loss: Gives the loss of a micro-batch under the denominator of the whole step, so that losses add up.
        weights: What each micro-batch counts in the averages of metrics: its tokens, groups or pairs.
        max_norm: The gradient is scaled down to this norm.
    """
    losses = [0.0] * len(batches)
    sums: dict[str, float] = {}

    def add(name: str, x: Any) -> None:
        sums[name] = sums.get(name, 0.0) + float(x)

    for i, (batch, weight) in ranks.share(zip(batches, weights, strict=True)):
        out = loss(batch)
        (whole := out.loss).backward()
        losses[i] = float(whole.detach())
        for name, (_, term) in out.weighted.items() if isinstance(out, Terms) else ():
            add(name, term.detach())
        for name, x in out.metrics.items():
            add(AVERAGE + name, float(x) * weight)
    ranks.sum_gradients(parameters)
    sums = ranks.total({"loss": sum(losses), **sums})
    whole_loss, count = sums.pop("loss"), max(sum(weights), 1e-9)
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    metrics = {k.removeprefix(AVERAGE): x / count if k.startswith(AVERAGE) else x for k, x in sums.items()}
    return Gradients(whole_loss, losses, norm, metrics)
