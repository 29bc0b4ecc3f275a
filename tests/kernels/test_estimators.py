"""Estimators of a KL as a term of the loss: which may be one, and what each of them shows."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk
from tests.support.identity_head import ADVANTAGES, EYE, V, logp_of, rows


def test_k1_cannot_be_a_loss_term_and_this_is_why():
    """E[grad k1] = E[grad log p] = 0 exactly, whatever the reference: a penalty that never pushes."""
    x, y, old = rows()
    with pytest.raises(ValueError, match="expected gradient is zero"):
        rk.ppo_loss(x, EYE, y, old, ADVANTAGES, ref_logp=old, kl_coef=0.1, kl="k1")
    assert "kl" in rk.ppo_loss(x, EYE, y, old, ADVANTAGES, ref_logp=old, kl="k1").metrics  # logging it is fine
    every = torch.arange(V)
    logits, ref = x[:1].expand(V, V), torch.randn(1, V).double().log_softmax(-1)[0]
    p = x[0].log_softmax(-1).exp().detach()

    def expected_gradient(estimate):
        return torch.autograd.grad((p * estimate).sum(), x, retain_graph=True)[0][0]

    k1 = logp_of(logits, every) - ref
    truth = torch.autograd.grad((x[0].log_softmax(-1).exp() * (x[0].log_softmax(-1) - ref)).sum(), x)[0][0]
    assert expected_gradient(k1).abs().max() < 1e-15
    torch.testing.assert_close(expected_gradient(0.5 * k1.square()), truth)  # only k2's is that of the KL


@pytest.mark.parametrize("kl", ["k1+", "k3+"])
def test_plus_estimators_show_their_value_and_carry_the_gradient_of_k2(kl):
    x, y, ref = rows()
    none = torch.zeros(10).double()
    out = rk.ppo_loss(x, EYE, y, None, none, ref_logp=ref, kl_coef=1.0, kl=kl)
    log_ratio = logp_of(x, y) - ref
    value = {"k1+": log_ratio, "k3+": torch.expm1(-log_ratio) + log_ratio}[kl]
    torch.testing.assert_close(out.loss, value.mean().detach())
    (got,) = torch.autograd.grad(out.loss, x)
    (want,) = torch.autograd.grad(0.5 * log_ratio.square().mean(), x)
    torch.testing.assert_close(got, want)


def test_kl_coef_zero_only_logs():
    x, y, ref = rows()
    plain = rk.ppo_loss(x, EYE, y, None, ADVANTAGES)
    logged = rk.ppo_loss(x, EYE, y, None, ADVANTAGES, ref_logp=ref)
    assert plain.loss == logged.loss
    assert logged.metrics["kl"] > 0
    with pytest.raises(ValueError, match="ref_logp"):
        rk.ppo_loss(x, EYE, y, None, ADVANTAGES, kl_coef=0.1)
