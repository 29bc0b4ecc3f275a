"""Value, Bradley-Terry, Plackett-Luce and InfoNCE losses against the oracle, and against each other where K is 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.identity_head import same
from tests.support.problems import A_FEW, ulp

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


def test_ties_bradley_terry_skips_and_plackett_luce_counts_after_breslow():
    s = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([1, 2, 2, 3])
    pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    bt = torch.stack([-F.logsigmoid(s[i] - s[j]) for i, j in pairs]).mean()
    same(rk.bradley_terry_loss(s, ranks=ranks, groups=4), bt, s)
    tied = s[1:].logsumexp(0)
    breslow = (s.logsumexp(0) - s[0]) + (tied - s[1]) + (tied - s[2])
    same(rk.plackett_luce_loss(s, ranks, 4), breslow, s)
    same(rk.plackett_luce_loss(s, ranks, 4, top=1), s.logsumexp(0) - s[0], s)
    everything_tied = rk.bradley_terry_loss(s, ranks=torch.ones(4), groups=4)
    assert everything_tied.loss == 0
    assert not torch.autograd.grad(everything_tied.loss, s)[0].any()


def test_smaller_rank_is_better_and_only_order_matters():
    s = torch.tensor([2.0, 1.0, 0.0])
    for ranks in ([1, 2, 3], [0, 7, 900], [-1.5, -0.5, 0.25]):
        assert rk.bradley_terry_loss(s, ranks=torch.tensor(ranks), groups=3).metrics["accuracy"] == 1
        assert (
            rk.plackett_luce_loss(s, torch.tensor(ranks), 3).loss
            == rk.plackett_luce_loss(s, torch.tensor([1, 2, 3]), 3).loss
        )


def test_with_two_members_all_three_losses_are_bradley_terry():
    s = torch.randn(8, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    expected = -F.logsigmoid(s[0::2] - s[1::2]).mean()
    same(rk.bradley_terry_loss(s), expected, s)
    same(rk.bradley_terry_loss(s, ranks=torch.tensor([1, 2] * 4), groups=2), expected, s)
    same(rk.plackett_luce_loss(s, torch.tensor([1, 2] * 4), 2), expected, s)
    same(rk.infonce_loss(s, torch.tensor([True, False] * 4), 2), expected, s)


def test_a_prompt_counts_once_however_many_replies_it_has():
    """All pairs of a group are averaged first: with pairs pooled, a prompt of 8 replies outweighs one of 2 by 28."""
    s = torch.tensor([0.5, -0.5, 1.0, 0.2, -0.7], dtype=torch.float64, requires_grad=True)
    ids, ranks = torch.tensor([7, 7, 2, 2, 2]), torch.tensor([1, 2, 1, 2, 3])
    small = -F.logsigmoid(s[0] - s[1])
    large = -(F.logsigmoid(s[2] - s[3]) + F.logsigmoid(s[2] - s[4]) + F.logsigmoid(s[3] - s[4])) / 3
    same(rk.bradley_terry_loss(s, ranks=ranks, groups=ids), (small + large) / 2, s)
    shuffle = torch.tensor([3, 0, 4, 2, 1])
    same(rk.bradley_terry_loss(s[shuffle], ranks=ranks[shuffle], groups=ids[shuffle]), (small + large) / 2, s)


def test_reward_margin_and_centring():
    """The margin is asked of the better reply; centring pulls the pair's *sum* to zero, not the difference."""
    s = torch.tensor([0.5, -0.5, 1.0, 0.2], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([0.3, 0.9], dtype=torch.float64)
    expected = (-F.logsigmoid(s[0::2] - s[1::2] - margin) + 0.1 * (s[0::2] + s[1::2]).square()).mean()
    same(rk.bradley_terry_loss(s, margin=margin, center_coef=0.1), expected, s)


def test_infonce_divides_by_its_temperature_and_averages_positives():
    s = torch.randn(6, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
    positive = torch.tensor([False, True, False, True, True, False])
    log_p = (s.view(2, 3) / 0.5).log_softmax(1)
    out = rk.infonce_loss(s, positive, 3, temperature=0.5)
    same(out, -(log_p[0, 1] + (log_p[1, 0] + log_p[1, 1]) / 2) / 2, s)
