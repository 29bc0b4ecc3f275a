"""How far a result is from the truth, and whether that is rounding or a mistake.

Sizes of errors say how good a contender is; their direction says whether it computes something else. Rounded logits
scatter log-probabilities and gradients around the truth, a forgotten factor moves them all one way: scales are held to
much less than sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.work.cases import Batch
from benchmarks.work.objectives import LOSSES, weighted
from benchmarks.work.truth import Expected, Result, Truth, expect, expect_kl, expect_logits

Judge = Callable[[Any], tuple[dict[str, float], str]]  # what a step returned -> errors, verdict


def judge_for(op: str, batch: Batch, truth: Truth, ref_truth: Truth | None) -> tuple[Judge, float | None]:
    """Who holds results of an op to the truth, and the share of the kept rows that have no gradient."""
    expected: Expected | None = None
    if op in LOSSES:
        ref_logp = None if ref_truth is None else ref_truth.logp
        head = (batch.hidden, batch.weight, batch.targets)
        expected = expect(lambda logp: LOSSES[op](logp, ref_logp, batch), truth, *head, batch.kept)
    elif op == "kl":
        expected = expect_kl(truth, batch)
    elif op == "logits":
        assert batch.logits is not None
        truth, expected = expect_logits(lambda logp: weighted(logp, None, batch), truth, batch.logits, batch.targets)

    def judge(result: Result) -> tuple[dict[str, float], str]:
        own = expected
        if result.value is not None and expected is not None:
            logp = truth.logp.clone().requires_grad_()
            loss = result.value(logp, None, batch)
            (g,) = torch.autograd.grad(loss, logp)
            own = expected._replace(loss=loss.item(), slope=g.norm().item())
        errors = errors_of(result, truth, own, batch.kept)
        slope = None if own is None else own.slope
        largest = max(truth.largest_logit, truth.logp.abs().max().item())  # whichever is rounded
        return errors, verdict(errors, batch.hidden.dtype, largest, slope, 3.0 if op == "kl" else 1.0)

    return judge, None if expected is None else expected.zero_rows


def _statistic(name: str, found: Tensor, right: Tensor, kept: Tensor) -> dict[str, float]:
    found, right = found.detach().double(), right[kept]
    off = (found if found.numel() != kept.numel() else found[kept]) - right
    return {f"{name}_max": off.abs().max().item(), f"{name}_mean": off.abs().mean().item()} | _scale(
        name, off + right, right
    )


def _gradient(name: str, found: Tensor, right: Tensor) -> dict[str, float]:
    found = found.double()
    off = found - right
    sizes = {name: (off.norm() / right.norm()).item(), f"{name}_max": (off.abs().max() / right.abs().max()).item()}
    return sizes | _scale(name, found, right)


def _scale(name: str, found: Tensor, right: Tensor) -> dict[str, float]:
    """How much longer the found is along the right than it should be, less what chance would make of its errors."""
    off = found - right
    along = (off * right).sum().abs() / right.square().sum()
    chance = 3 * off.square().mean().sqrt() / right.norm()
    return {f"{name}_scale": max(0.0, (along - chance).item()) if off.isfinite().all() else math.nan}


def errors_of(result: Result, truth: Truth, expected: Expected | None, kept: Tensor) -> dict[str, float]:
    """Distance from float64 of everything the contender handed back; gradients relative, the others in nats."""
    found: dict[str, float] = {}
    if result.logp is not None:
        found |= _statistic("logp", result.logp, truth.logp, kept)
    if result.entropy is not None:
        found |= _statistic("entropy", result.entropy, truth.entropy, kept)
    if expected is None:
        return found
    if result.kl is not None and expected.kl is not None:
        found |= _statistic("kl", result.kl, expected.kl, kept)
    if result.loss is not None:
        found["loss"] = abs(result.loss.item() - expected.loss)
    if result.grad_hidden is not None and expected.grad_hidden is not None:
        found |= _gradient("grad_hidden", result.grad_hidden[truth.rows], expected.grad_hidden)
    if result.grad_weight is not None and expected.grad_weight is not None:
        found |= _gradient("grad_weight", result.grad_weight[truth.columns], expected.grad_weight)
    if result.grad_logits is not None and expected.grad_logits is not None:
        found |= _gradient("grad_logits", result.grad_logits[truth.rows], expected.grad_logits)
    return found


def verdict(
    errors: dict[str, float],
    dtype: torch.dtype,
    largest_logit: float,
    slope: float | None = None,
    gradients: float = 1.0,
) -> str:
    """ "ok", or "wrong" and in what: errors beyond what logits rounded to the dtype of the inputs explain.

    bfloat16 logits are off by up to 2^-8 of their size; twice that is allowed for a log-probability. A loss may be off
    by what such errors, each its own way, make of it. A wrong contender is shown, and is nobody's rival.

    Args:
        errors: what ``errors_of`` found.
        dtype: that of the head.
        largest_logit: by magnitude.
        slope: norm of the loss's derivatives by its N statistics; None allows a loss what a statistic is allowed.
        gradients: how much more rounding makes of gradients that are differences of nearly equal logits.
    """
    rounded = dtype != torch.float32
    logp = largest_logit * 2.0**-7 if rounded else 1e-3
    limits = {
        "logp_max": logp,
        "logp_mean": logp / 4,
        "kl_max": 2 * logp,
        "kl_mean": logp / 2,
        "entropy_max": 4 * logp,
        "entropy_mean": logp,
        "loss": logp if slope is None else min(logp, 1e-4 + logp * slope + (logp**2 / 8 if rounded else 0)),
    }
    scale = 0.005 if rounded else 1e-4
    scales = {"logp_scale": scale, "entropy_scale": scale, "kl_scale": 10 * scale}  # a KL is a small difference
    over = []
    for name, x in errors.items():
        if name.endswith("_scale"):
            limit = scales.get(name, gradients * (0.06 if rounded else 1e-3))
        else:
            # where rows cancel each other, plain float32 is off by 1e-3 of what is left
            limit = limits.get(name, gradients * (0.1 if rounded else 5e-3) * (2 if name.endswith("_max") else 1))
        if math.isnan(x) or x > limit:
            over.append(name)
    return f"wrong: {', '.join(over)}" if over else "ok"
