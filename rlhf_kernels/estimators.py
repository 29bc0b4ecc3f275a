"""Estimators of KL(policy | reference) from the tokens that the policy sampled.

Schulman 2020, http://joschu.net/blog/kl-approx.html: with r = ref / policy, k1 = -log r, k2 = (log r)^2 / 2 and
k3 = r - 1 - log r. As a *reward* any of them serves. As a *loss term* what counts is the gradient: k1's has
expectation zero whatever the policy, k3's is that of the forward KL, and only k2's is that of the reverse KL. ``k1+``
and ``k3+`` therefore show the value of k1 and k3 and carry the gradient of k2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.checks import one_of

VALUES = ("k1", "k2", "k3")
LOSS_TERMS = ("k2", "k3", "k1+", "k3+")


def safe_exp(x: Tensor) -> Tensor:
    """exp(x), held just below overflow (e^80 in float32), with a zero gradient beyond."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 8).exp()


def kl_estimate(logp: Tensor, ref_logp: Tensor, kl: str) -> Tensor:
    """Per-token estimate of KL(policy | reference), [N] in, [N] out, differentiable in ``logp``.

    >>> from rlhf_kernels.estimators import kl_estimate
    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0]), "k2")
    tensor([2.])
    """
    log_ratio = ref_logp.to(logp.dtype) - logp
    if kl == "k1":
        return -log_ratio
    if kl == "k2":
        return 0.5 * log_ratio.square()
    if kl == "k3":
        # Clamped as a whole: were only the exponential held, the gradient would turn its sign beyond.
        log_ratio = log_ratio.clamp(max=math.log(torch.finfo(log_ratio.dtype).max) - 8)
        return torch.expm1(log_ratio) - log_ratio
    value, k2 = kl_estimate(logp, ref_logp, kl[:2]).detach(), kl_estimate(logp, ref_logp, "k2")
    return value + (k2 - k2.detach())


def check_loss_term(kl: str, coef: float) -> None:
    """Refuse estimators that cannot be a loss term; with ``coef`` zero they are only logged."""
    one_of("kl", kl, (*LOSS_TERMS, "k1", "exact"))
    if kl == "k1" and coef:
        raise ValueError(
            "kl: got 'k1' as a loss term, but its expected gradient is zero (the score function averages to zero); "
            "wants 'k1+' (the same value with the gradient of k2), 'k2', 'k3', 'k3+' or 'exact'"
        )
