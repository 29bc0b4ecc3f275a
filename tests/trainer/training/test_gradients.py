"""Micro-batches add up to their step: gradients, terms of the loss, averages; and the norm is clipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rlhf_kernels as rk
from trainer.training.gradients import Terms, accumulate

BATCHES, TOKENS = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 8.0])), (2, 3)


def loss_of(w: nn.Parameter, scale: float = 1.0):
    def loss(x: torch.Tensor) -> Terms:
        """Two shares under the denominator of the step, five rows, and a mean over the rows of this batch."""
        return Terms({"fit": (1.0, (w[0] * x).sum() / 5), "pull": (scale, w[1] * len(x) / 5)}, {"mean": x.mean()})

    return loss


def test_shares_add_up_and_terms_are_logged_without_their_weights() -> None:
    w = nn.Parameter(torch.tensor([2.0, 7.0]))
    found = accumulate([w], BATCHES, loss_of(w, 0.5), TOKENS, math.inf)
    assert w.grad is not None
    assert w.grad.tolist() == pytest.approx([18 / 5, 0.5])
    assert found.metrics == pytest.approx({"fit": 2 * 18 / 5, "pull": 7.0, "mean": 18 / 5})
    assert found.loss == pytest.approx(2 * 18 / 5 + 0.5 * 7)
    assert found.losses == pytest.approx([2 * 3 / 5 + 0.5 * 7 * 2 / 5, 2 * 15 / 5 + 0.5 * 7 * 3 / 5])
    assert found.norm == pytest.approx(math.hypot(18 / 5, 0.5))
    assert found.finite


def test_the_norm_is_told_as_it_was_and_the_gradient_is_scaled_down() -> None:
    w = nn.Parameter(torch.tensor([2.0, 7.0]))
    found = accumulate([w], BATCHES, loss_of(w), TOKENS, 0.1)
    assert found.norm == pytest.approx(math.hypot(18 / 5, 1.0))
    assert float(w.grad.norm()) == pytest.approx(0.1, rel=1e-4)  # type: ignore[union-attr]


def test_a_loss_of_the_library_is_one_term() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    found = accumulate([w], BATCHES, lambda x: rk.LossOutput((w * x).sum(), {"n": torch.tensor(1.0)}), TOKENS, math.inf)
    assert found.loss == 36.0
    assert found.metrics == {"n": 1.0}


def test_what_is_not_finite_is_told() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    assert not accumulate([w], BATCHES, lambda x: rk.LossOutput((w * math.inf).sum(), {}), TOKENS, 1.0).finite
