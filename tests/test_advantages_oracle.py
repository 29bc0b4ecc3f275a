"""Advantages against the definitions of their papers: float64 sums where the library runs recurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import A_FEW, ulp
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference

CU = torch.tensor([0, 9, 9, 10, 23, 40, 42], dtype=torch.int32)
N, S = 42, 6
GENERATOR = torch.Generator().manual_seed(70)
REWARDS, VALUES = torch.randn(2, N, generator=GENERATOR)
BOOTSTRAP, SCORES = torch.randn(2, S, generator=GENERATOR)
MASK = torch.rand(N, generator=GENERATOR) > 0.4
MASK[40:] = False  # the last sequence is masked altogether
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def agree(got: Tensor, exact: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == exact.shape
    budget = A_FEW * terms * ulp(dtype) * max(1.0, exact.abs().max().item())
    assert (got.double() - exact).abs().max() <= budget


GAE: dict[str, dict[str, Any]] = {
    "default": {},
    "discounted": {"gamma": 0.9, "lam": 0.8},
    "one-step": {"gamma": 0.97, "lam": 0.0},
    "monte-carlo": {"lam": 1.0},
    "truncated": {"gamma": 0.99, "bootstrap": BOOTSTRAP},
    "masked": {"gamma": 0.95, "lam": 0.9, "mask": MASK},
    "masked-truncated": {"gamma": 0.95, "lam": 0.9, "mask": MASK, "bootstrap": BOOTSTRAP},
    "whitened": {"gamma": 0.95, "whiten": True},
    "whitened-masked": {"mask": MASK, "bootstrap": BOOTSTRAP, "whiten": True},
}


@EVERY_DTYPE
@pytest.mark.parametrize("case", list(GAE))
def test_gae(dtype, case):
    kwargs = GAE[case]
    rewards = (REWARDS if "mask" not in kwargs else REWARDS.where(MASK, 0.0)).to(dtype)
    values = (VALUES if "mask" not in kwargs else VALUES.where(MASK, torch.nan)).to(dtype)
    exact = reference.gae(rewards, values, CU, **kwargs)
    for got, truth in zip(rk.gae(rewards, values, CU, **kwargs), exact, strict=True):
        agree(got, truth, dtype, terms=2)
        if "mask" in kwargs:
            assert not got[~MASK].any()


@EVERY_DTYPE
@pytest.mark.parametrize("kwargs", [{}, {"shift_mean": False}, {"mask": MASK}, {"mask": MASK, "eps": 0.5}], ids=list)
def test_whiten(dtype, kwargs):
    x = (3 + 2 * REWARDS).to(dtype)
    if "mask" in kwargs:
        x = x.where(MASK, torch.nan)
    agree(rk.whiten(x, **kwargs), reference.whiten(x, **kwargs), dtype, terms=2)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kl_clip", [None, 0.3])
def test_shaped_rewards(kl, masked, kl_clip):
    logp, ref_logp = VALUES - 2, VALUES - 2 + 0.7 * REWARDS
    kwargs = {"beta": 0.3, "kl": kl, "kl_clip": kl_clip, "mask": MASK if masked else None}
    got = rk.shaped_rewards(SCORES, logp, ref_logp, CU, **kwargs)
    for mine, truth in zip(got, reference.shaped_rewards(SCORES, logp, ref_logp, CU, **kwargs), strict=True):
        agree(mine, truth, torch.float32, terms=2)


@pytest.mark.parametrize("groups", [7, 2, torch.randint(9, (N,), generator=GENERATOR)], ids=["seven", "two", "ids"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std", None])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_group_advantages(groups, baseline, scale, eps):
    kwargs = {"baseline": baseline, "scale": scale, "eps": eps}
    agree(
        rk.group_advantages(REWARDS, groups, **kwargs),
        reference.group_advantages(REWARDS, groups, **kwargs),
        torch.float32,
    )
