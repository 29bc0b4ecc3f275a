"""The value loss against the oracle, and which of its meanings we chose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.kernels.losses.test_reward import compare, normal
from tests.support.identity_head import same


def test_value_loss_is_half_the_larger_square():
    """Half, as baselines and lm-human-preference-details have it: the coefficient of a recipe assumes it."""
    v = torch.tensor([1.0, 1.0, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, -1.0, 0.5, 5.0], dtype=torch.float64)
    old = torch.zeros(4, dtype=torch.float64)
    clipped = v.clamp(-0.2, 0.2)
    expected = 0.5 * torch.maximum((v - returns).square(), (clipped - returns).square()).mean()
    out = rk.value_loss(v, returns, old_values=old, clip=0.2)
    same(out, expected, v)
    assert out.metrics["clipfrac"].item() == pytest.approx(0.25)  # only where the clipped square is the larger
    unexplained = (returns - v).var(correction=0) / returns.var(correction=0)
    assert out.metrics["explained_var"].item() == pytest.approx(1 - unexplained.item())


def test_masked_values_never_matter_even_when_they_are_nan():
    v = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    out = rk.value_loss(v, torch.tensor([0.0, math.nan, 1.0]), mask=torch.tensor([True, False, True]))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.5 * (1 + 4) / 2)
    assert v.grad.tolist() == [0.5, 0.0, 1.0]


CU = torch.tensor([0, 7, 7, 12, 29, 40])


VALUE: dict[str, dict[str, Any]] = {
    "default": {},
    "clip": {"old_values": normal(40, seed=1), "clip": 0.3},
    "mask": {"mask": normal(40, seed=2) > -0.3},
    "sequence-mean": {"reduction": "sequence_mean", "cu_seqlens": CU},
    "sequence-sum": {"reduction": "sequence_sum", "cu_seqlens": CU, "num_sequences": 9, "mask": torch.arange(40) < 25},
    "tokens": {"num_tokens": torch.tensor(100), "old_values": normal(40, seed=1), "clip": 0.2},
}


@pytest.mark.parametrize("case", list(VALUE))
@pytest.mark.parametrize("half", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_value_loss(case, half):
    values, returns = normal(40).to(half), normal(40, seed=3)
    compare(rk.value_loss, reference.value_loss, values, returns, **VALUE[case])


def test_value_loss_ignores_what_is_masked():
    mask = normal(40, seed=2) > -0.3
    returns, old = normal(40, seed=3).where(mask, torch.nan), normal(40, seed=1).where(mask, torch.nan)
    compare(rk.value_loss, reference.value_loss, normal(40), returns, mask=mask, old_values=old, clip=0.3)
    values = normal(40).where(mask, torch.nan).requires_grad_()
    out = rk.value_loss(values, returns, mask=mask)
    out.loss.backward()
    assert out.loss.isfinite()
    assert values.grad is not None
    assert not values.grad[~mask].any()


def test_value_loss_of_nothing():
    values = normal(4).requires_grad_()
    out = rk.value_loss(values, normal(4), mask=torch.zeros(4, dtype=torch.bool))
    out.loss.backward()
    assert out.loss == 0
    assert values.grad is not None
    assert not values.grad.any()
