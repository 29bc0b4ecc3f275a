"""Where trainers disagree about KTO: each test says which meaning we chose, and why."""

from __future__ import annotations

import torch

import rlhf_kernels as rk
from tests.support.identity_head import CU, EYE, logp_of, per_sequence, rows, same


def test_kto_baseline_is_detached_and_not_negative():
    """Eq. 8: z0 is a KL, so it is at least zero, and no gradient flows through it."""
    x, y, ref = rows()
    desirable = torch.tensor([True, False, False, True])
    r = per_sequence(logp_of(x, y) - ref)
    for kl in (0.6, -3.0):
        z = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
        value = torch.sigmoid(torch.where(desirable, r - max(kl, 0.0), max(kl, 0.0) - r) * 0.5)
        weight = torch.where(desirable, 1.5, 0.5)
        out = rk.kto_loss(x, EYE, y, CU, ref, desirable, z, beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)
        same(out, (weight * (1 - value)).mean(), x)
        again = rk.kto_loss(x, EYE, y, CU, ref, desirable, z, beta=0.5).loss
        assert torch.autograd.grad(again, z, allow_unused=True) == (None,)
