"""Pairs of replies: which of them count, and odds that stay finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from tests.kernels.losses.test_preference import pair_log_ratios
from tests.support.identity_head import CU, EYE, V, rows, same


def test_a_pair_needs_tokens_on_both_sides():
    """A chosen reply against nothing is no comparison: the pair leaves numerator and denominator."""
    x, y, ref = rows()
    y = y.clone()
    y[3:5] = -100  # the rejected reply of the first pair
    expected = -F.logsigmoid(0.1 * pair_log_ratios(x, y, ref)[1])
    same(rk.dpo_loss(x, EYE, y, CU, ref), expected, x)
    for out in (rk.orpo_loss(x, EYE, y, CU), rk.simpo_loss(x, EYE, y, CU), rk.ipo_loss(x, EYE, y, CU, ref)):
        assert out.loss.isfinite()
        assert torch.autograd.grad(out.loss, x)[0].isfinite().all()


def test_orpo_of_a_certain_reply_is_finite():
    """p = 1 has infinite odds; ours are large, finite and flat there, and exact short of it."""
    x = torch.zeros(4, V)
    x[torch.arange(4), torch.arange(4)] = 200.0  # every target certain in float32
    x.requires_grad_()
    out = rk.orpo_loss(x, EYE.float(), torch.arange(4), torch.tensor([0, 2, 4]))
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
    from rlhf_kernels.losses.pairs import log_odds

    m = -torch.logspace(-12, 2, 60, dtype=torch.float64)
    torch.testing.assert_close(log_odds(m), m - torch.log(-torch.expm1(m)), rtol=1e-12, atol=0)
    single = log_odds(m.float()).double()
    exact = m.float().double() - torch.log(-torch.expm1(m.float().double()))
    torch.testing.assert_close(single, exact, rtol=1e-6, atol=1e-6)


def test_odd_number_of_preference_sequences_is_refused():
    x, y, ref = rows()
    with pytest.raises(ValueError, match="cu_seqlens"):
        rk.dpo_loss(x, EYE, y, torch.tensor([0, 3, 5, 10]), ref)
