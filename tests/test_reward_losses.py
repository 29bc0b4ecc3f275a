"""Value, Bradley-Terry, Plackett-Luce and InfoNCE losses against the oracle, and against each other where K is 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import A_FEW, ulp
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference

F32 = torch.float32


def compare(loss: Callable[..., Any], oracle: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Value and gradient within a few ulps: these losses never meet a matrix product."""
    exact, got = x.double().clone().requires_grad_(), x.clone().requires_grad_()
    truth, out = oracle(exact, *args, **kwargs), loss(got, *args, **kwargs)
    (1.7 * truth).backward()
    (1.7 * out.loss).backward()
    assert exact.grad is not None
    assert got.grad is not None
    assert out.loss.dtype == torch.promote_types(x.dtype, F32)
    assert abs(out.loss.double() - truth) <= A_FEW * ulp(x.dtype) * max(1.0, abs(truth))
    coarse = torch.finfo(x.dtype).eps if x.dtype != torch.float64 else ulp(x.dtype)
    assert (got.grad.double() - exact.grad).norm() <= max(coarse, A_FEW * ulp(x.dtype)) * exact.grad.norm() + 1e-300
    for name, metric in out.metrics.items():
        assert metric.shape == (), name
        assert not metric.requires_grad, name
        assert metric.isfinite(), name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


SCORES = 3 * normal(24, seed=4)
RANKS = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 1, 1, 5, 5, 5, 5, 2, 0, 2, 1, 1, 0, 0, 0])
IDS = torch.tensor([7, 7, 3, 3, 3, 9, 9, 9, 9, 9, 1, 7, 2, 2, 2, 4, 4, 4, 4, 5, 5, 5, 5, 5])
BRADLEY: dict[str, dict[str, Any]] = {
    "pairs": {},
    "pairs-margin": {"margin": 0.7},
    "pairs-margins": {"margin": normal(12, seed=5)},
    "pairs-centred": {"center_coef": 0.05},
    "pairs-smoothed": {"label_smoothing": 0.1},
    "pairs-number": {"num_groups": 30},
    "ranked": {"ranks": RANKS, "groups": 4},
    "ranked-ids": {"ranks": RANKS, "groups": IDS},
    "ranked-all": {"ranks": RANKS, "groups": 6, "label_smoothing": 0.2, "num_groups": torch.tensor(7.0)},
    "ranked-margin": {"ranks": RANKS, "groups": 4, "margin": 0.3},
}


@pytest.mark.parametrize("case", list(BRADLEY))
@pytest.mark.parametrize("half", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_bradley_terry(case, half):
    compare(rk.bradley_terry_loss, reference.bradley_terry_loss, SCORES.to(half), **BRADLEY[case])


PLACKETT: dict[str, dict[str, Any]] = {
    "four": {"groups": 4},
    "ids": {"groups": IDS},
    "number": {"groups": 6, "num_groups": 11},
    "top-one": {"groups": 4, "top": 1},
    "top-two": {"groups": 6, "top": 2},
}


@pytest.mark.parametrize("case", list(PLACKETT))
@pytest.mark.parametrize("ties", [False, True])
def test_plackett_luce(case, ties):
    ranks = RANKS if ties else normal(24, seed=6).argsort()
    compare(rk.plackett_luce_loss, reference.plackett_luce_loss, SCORES, ranks, **PLACKETT[case])


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.3}, {"num_groups": 13}], ids=str)
def test_infonce(kwargs):
    positive = torch.zeros(24, dtype=torch.bool)
    positive[torch.tensor([2, 4, 11, 15, 16, 22])] = True
    compare(rk.infonce_loss, reference.infonce_loss, SCORES, positive, 4, **kwargs)
    positive[torch.tensor([0, 5, 12, 13])] = True  # several, then a group of nothing else, then one without any
    positive[:4], positive[20:] = True, False
    compare(rk.infonce_loss, reference.infonce_loss, SCORES, positive, 4, **kwargs)
    compare(rk.infonce_loss, reference.infonce_loss, SCORES, positive, IDS, **kwargs)


def test_with_two_they_are_all_bradley_terry():
    ranks, first = torch.tensor([0, 1] * 12), torch.tensor([True, False] * 12)
    expected = -torch.nn.functional.logsigmoid(SCORES[0::2] - SCORES[1::2]).mean()
    for out in (
        rk.bradley_terry_loss(SCORES),
        rk.bradley_terry_loss(SCORES, ranks=ranks),
        rk.plackett_luce_loss(SCORES, ranks, 2),
        rk.infonce_loss(SCORES, first, 2),
    ):
        assert torch.allclose(out.loss, expected, rtol=1e-6)


def test_permuting_the_tied_is_harmless():
    ranks = torch.tensor([0, 1, 1, 2, 1])
    scores = normal(5, seed=8)
    swapped = scores[[0, 4, 1, 3, 2]]
    for top in (None, 1):
        one, other = (rk.plackett_luce_loss(s, ranks, 5, top=top).loss for s in (scores, swapped))
        assert torch.allclose(one, other, rtol=1e-6)
    one, other = (rk.bradley_terry_loss(s, ranks=ranks, groups=5).loss for s in (scores, swapped))
    assert torch.allclose(one, other, rtol=1e-6)


def test_huge_gaps_stay_finite():
    scores = torch.tensor([500.0, -500.0, -500.0, 500.0], requires_grad=True)
    out = rk.bradley_terry_loss(scores)
    out.loss.backward()
    assert out.loss == 500
    assert scores.grad is not None
    assert torch.allclose(scores.grad, torch.tensor([0.0, 0.0, -0.5, 0.5]))


def test_groups_of_nothing_but_ties_leave_the_mean():
    ranks = torch.tensor([1, 1, 0, 1])
    out = rk.bradley_terry_loss(torch.tensor([1.0, 2.0, 0.5, -0.5]), ranks=ranks, groups=2)
    assert torch.allclose(out.loss, -torch.nn.functional.logsigmoid(torch.tensor(1.0)))
    tied = rk.bradley_terry_loss(torch.tensor([1.0, 2.0], requires_grad=True), ranks=torch.tensor([0, 0]))
    assert tied.loss == 0
    tied.loss.backward()


def test_nothing_to_compare_is_zero_however_groups_are_named():
    nothing = torch.zeros(0, requires_grad=True)
    ids, no = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    for groups in (2, ids):
        losses = [
            rk.plackett_luce_loss(nothing, ids, groups),
            rk.infonce_loss(nothing, no, groups),
            rk.bradley_terry_loss(nothing, ranks=ids, groups=groups),
        ]
        for out in losses:
            assert out.loss == 0
            assert all(x == 0 for x in out.metrics.values())
        assert rk.group_advantages(nothing, groups).shape == (0,)
