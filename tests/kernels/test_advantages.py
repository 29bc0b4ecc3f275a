"""Whitening, group baselines and shaped rewards against their definitions."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import A_FEW, ulp

# Whitening


def test_whiten_uses_the_biased_variance_of_what_is_kept():
    x, mask = torch.tensor([1.0, 2.0, math.nan, 6.0]), torch.tensor([True, True, False, True])
    mean, std = 3.0, math.sqrt((4 + 1 + 9) / 3)
    torch.testing.assert_close(rk.whiten(x, mask), torch.tensor([(1 - mean) / std, (2 - mean) / std, 0.0, 3 / std]))
    kept = rk.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([-2 / std + 3, -1 / std + 3, 0.0, 3 / std + 3]))


@pytest.mark.parametrize("mask", [None, torch.tensor([False, True, False]), torch.zeros(3, dtype=torch.bool)])
def test_whiten_survives_one_value_and_none(mask):
    x = torch.tensor([5.0]) if mask is None else torch.tensor([5.0, 7.0, 9.0])
    assert not rk.whiten(x, mask).any()
    assert rk.whiten(torch.zeros(0)).shape == (0,)


def test_whiten_is_accurate_far_from_zero_and_takes_bfloat16():
    x = torch.tensor([10_000.0, 10_000.5, 10_001.0])
    assert rk.whiten(x)[2].item() == pytest.approx(math.sqrt(1.5), rel=1e-4)
    white = rk.whiten(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    assert white.dtype == torch.float32
    assert white.tolist() == pytest.approx([-1.0, 1.0])


def test_whiten_over_ranks_equals_whiten_over_the_batch():
    """However the rows are split, and even where a rank has none to offer."""
    x = torch.randn(11, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([False] * 3 + [True] * 4 + [False, True, False, True])
    store = dist.HashStore()

    def rank(i):
        group = dist.ProcessGroupGloo(store, i, 2)
        part = slice(0, 3) if i == 0 else slice(3, None)
        return rk.whiten(x[part], mask[part], process_group=group)

    with ThreadPoolExecutor(2) as threads:  # two ranks in one process: nothing but the group connects them
        parts = list(threads.map(rank, range(2)))
    torch.testing.assert_close(torch.cat(parts), rk.whiten(x, mask))
    assert not torch.allclose(rk.whiten(x[:7], mask[:7])[3:], rk.whiten(x, mask)[3:7])


# Groups


def test_group_advantages_by_hand():
    s = torch.tensor([1.0, 3.0, 0.0, 4.0])
    torch.testing.assert_close(rk.group_advantages(s, 2, eps=0.0), torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(rk.group_advantages(s, 2, scale=None), torch.tensor([-1.0, 1.0, -2.0, 2.0]))
    batch_std = s.std(correction=0)  # biased, like group_std: one reply fewer must not change the meaning
    torch.testing.assert_close(
        rk.group_advantages(s, 2, scale="batch_std", eps=0.0), torch.tensor([-1.0, 1.0, -2.0, 2.0]) / batch_std
    )
    three = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(
        rk.group_advantages(three, 3, baseline="leave_one_out", scale=None), torch.tensor([-3.0, -1.5, 4.5])
    )
    std = math.sqrt((4 + 1 + 9) / 3)
    torch.testing.assert_close(rk.group_advantages(three, 3, eps=0.5), torch.tensor([-2.0, -1.0, 3.0]) / (std + 0.5))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std", None])
def test_a_lone_member_and_a_group_without_contrast_get_zero(baseline, scale):
    got = rk.group_advantages(
        torch.tensor([0.1, 7.0, 0.1, 0.1]), torch.tensor([4, 9, 4, 4]), baseline=baseline, scale=scale
    )
    assert not got.any()


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(-3, 3), min_size=1, max_size=12), seed=st.integers(0, 999))
def test_group_ids_come_in_any_order(ids, seed):
    s = torch.randn(len(ids), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = torch.tensor(ids)
    got = rk.group_advantages(s, ids)
    for g in ids.unique():
        x = s[ids == g]
        want = (x - x.mean()) / (x.std(correction=0) + 1e-6) if len(x) > 1 else torch.zeros(1).double()
        torch.testing.assert_close(got[ids == g], want)


def test_group_advantages_refuses_what_makes_no_groups():
    s = torch.randn(6)
    for groups in (4, 0, torch.zeros(5, dtype=torch.int64), torch.zeros(6)):
        with pytest.raises(ValueError, match=r"^groups"):
            rk.group_advantages(s, groups)
    with pytest.raises(TypeError, match=r"^groups"):
        rk.group_advantages(s, "prompt")
    with pytest.raises(ValueError, match=r"^baseline"):
        rk.group_advantages(s, 2, baseline="median")
    with pytest.raises(ValueError, match=r"^scale"):
        rk.group_advantages(s, 2, scale="std")


# Shaped rewards


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_shaped_rewards_put_the_score_on_the_last_row_that_counts(kl):
    g = torch.Generator().manual_seed(5)
    cu = torch.tensor([0, 4, 4, 10, 11, 14])
    logp, ref = torch.randn(2, 14, generator=g, dtype=torch.float64).unbind()
    scores, mask = torch.randn(5, generator=g, dtype=torch.float64), torch.rand(14, generator=g) > 0.3
    mask[-3:] = False  # the last sequence has nowhere to put its score
    got, sums = rk.shaped_rewards(scores, logp, ref, cu, beta=0.3, mask=mask, kl=kl)
    estimate = {
        "k1": logp - ref,
        "k2": 0.5 * (logp - ref).square(),
        "k3": torch.expm1(ref - logp) - (ref - logp),
    }[kl].where(mask, 0.0)
    want = -0.3 * estimate
    for s, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        kept = [i for i in range(a, b) if mask[i]]
        if kept:
            want[kept[-1]] += scores[s]
        assert sums[s].item() == pytest.approx(estimate[a:b].sum().item(), abs=1e-12)
    torch.testing.assert_close(got, want)
    assert not got[~mask].any()


def test_kl_clip_bounds_the_price_and_not_the_report():
    logp, ref = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([-9.0, 4.0, -0.5])
    rewards, kl = rk.shaped_rewards(
        torch.zeros(1), logp, ref, torch.tensor([0, 3]), beta=torch.tensor(1.0), kl_clip=2.0
    )
    assert rewards.tolist() == [-2.0, 2.0, -0.5]
    assert kl.tolist() == [5.5]


def test_shaped_rewards_take_bfloat16_and_refuse_what_is_wrong():
    logp = torch.zeros(3, dtype=torch.bfloat16)
    cu = torch.tensor([0, 3])
    rewards, kl = rk.shaped_rewards(torch.ones(1, dtype=torch.bfloat16), logp, logp, cu, beta=0.1)
    assert rewards.dtype == kl.dtype == torch.float32
    assert rewards.tolist() == [0.0, 0.0, 1.0]
    for name, change in {
        "scores": {"scores": torch.ones(3)},
        "kl": {"kl": "k4"},
        "beta": {"beta": -1.0},
        "kl_clip": {"kl_clip": 0.0},
        "mask": {"mask": torch.ones(3)},
        "ref_logp": {"ref_logp": torch.zeros(2)},
    }.items():
        good = {"scores": torch.ones(1), "logp": logp, "ref_logp": logp, "cu_seqlens": cu, "beta": 0.1}
        with pytest.raises(ValueError, match=rf"^{name}"):
            rk.shaped_rewards(**{**good, **change})


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
