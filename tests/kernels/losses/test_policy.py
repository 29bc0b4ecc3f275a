"""Where trainers disagree about what a name means: each test says which meaning we chose, and why."""

import math

import pytest
import torch

import rlhf_kernels as rk
from tests.support.identity_head import ADVANTAGES, CU, EYE, logp_of, per_sequence, rows, same


def test_cispo_bounds_the_weight_on_both_sides_of_one():
    """[1 - low, 1 + high] as the paper's Eq. 5 and verl; Liger and TRL read ``epsilon_high`` as an absolute bound.

    One meaning of ``clip`` for both clip rules; and the weight is a constant, so no token is ever silenced.
    """
    x, y, old = rows()
    ratio = (logp_of(x, y) - old).exp()
    assert (ratio < 0.8).any()
    assert (ratio > 1.3).any()
    expected = -(ratio.detach().clamp(0.8, 1.3) * ADVANTAGES * logp_of(x, y)).mean()
    out = rk.ppo_loss(x, EYE, y, old, ADVANTAGES, clip=(0.2, 0.3), clip_rule="cispo")
    same(out, expected, x)
    assert (
        (torch.autograd.grad(rk.ppo_loss(x, EYE, y, old, ADVANTAGES, clip_rule="cispo").loss, x)[0] != 0).any(1).all()
    )


def test_gspo_in_token_form_has_the_gradient_of_the_papers_sequence_form():
    """GSPO Eq. 5 and 7 with one advantage per sequence; the token form (Eq. 14) is what ours computes."""
    x, y, old = rows()
    lengths = CU.diff()
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64)
    ratio = (per_sequence(logp_of(x, y) - old) / lengths).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.1) * advantages)
    out = rk.grpo_loss(
        x, EYE, y, old, advantages, clip=(0.05, 0.1), ratio="sequence", reduction="sequence_mean", cu_seqlens=CU
    )
    same(out, -clipped.mean(), x)


def test_gspo_lets_advantages_differ_within_a_sequence():
    """Eq. 14: the value is the sequence's ratio, the gradient each token's own; a (B, 1) coefficient cannot."""
    x, y, old = rows()
    logp = logp_of(x, y)
    mean = (per_sequence((logp - old).detach()) / CU.diff()).repeat_interleave(CU.diff())
    ratio = mean.exp() * (logp - logp.detach()).exp()
    expected = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.9, 1.1) * ADVANTAGES).mean()
    out = rk.ppo_loss(x, EYE, y, old, ADVANTAGES, clip=(0.1, 0.1), ratio="sequence", cu_seqlens=CU)
    same(out, expected, x)


def test_a_large_sequence_ratio_is_not_quietly_cut():
    """verl cuts sequence ratios at 10. A ratio means what it says; who wants a bound sets ``dual_clip``."""
    x, y, _ = rows()
    old = logp_of(x, y).detach() - 3.0
    out = rk.ppo_loss(x, EYE, y, old, -torch.ones(4).double(), ratio="sequence", cu_seqlens=CU)
    assert out.loss.item() == pytest.approx(math.exp(3.0), rel=1e-9)


def test_advantages_come_per_token_or_per_sequence():
    """Liger takes (B,) only, verl (B, T) only. [S] is [N] repeated, and needs boundaries that tell the two apart."""
    x, y, old = rows()
    each = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64)
    spread = rk.ppo_loss(x, EYE, y, old, each.repeat_interleave(CU.diff()))
    same(rk.ppo_loss(x, EYE, y, old, each, cu_seqlens=CU), spread.loss, x)
    with pytest.raises(ValueError, match="advantages"):
        rk.ppo_loss(x, EYE, y, old, each)
    with pytest.raises(ValueError, match="strictly"):
        rk.ppo_loss(x, EYE, y, old, each, cu_seqlens=torch.tensor([0, 3, 3, 9, 10]))


def test_dr_grpo_is_a_denominator():
    """Liger divides by B * max_length, verl by a scale factor alone. We take the paper's, as ``num_tokens``."""
    x, y, old = rows()
    ratio = (logp_of(x, y) - old).exp()
    surrogate = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES)
    same(rk.grpo_loss(x, EYE, y, old, ADVANTAGES, num_tokens=4 * 16), surrogate.sum() / 64, x)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_sequences_without_kept_tokens_leave_numerator_and_denominator(reduction):
    """verl and OpenRLHF leave them out; Liger and TRL count them, so that padding a batch shrinks the step."""
    x, y, old = rows()
    y = y.clone()
    y[3:5] = -100  # the second sequence, all of it
    y[0] = -100
    ratio = (logp_of(x, y) - old).exp()
    surrogate = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES)
    kept = surrogate * (y != -100)
    sums = per_sequence(kept)[[0, 2, 3]]
    lengths = per_sequence((y != -100).double())[[0, 2, 3]]
    expected = {
        "token_mean": kept.sum() / 7,
        "sequence_mean": (sums / lengths).mean(),
        "sequence_sum": sums.mean(),
    }[reduction]
    same(rk.grpo_loss(x, EYE, y, old, ADVANTAGES, reduction=reduction, cu_seqlens=CU), expected, x)


def test_dual_clip_holds_where_the_advantage_is_negative_only():
    """As in its paper and verl; TRL and Liger cap the ratio for every sign, which also clips good news."""
    x, y, _ = rows()
    old = logp_of(x, y).detach() - 2.0  # every ratio is e^2 = 7.4
    for sign, expected in ((-1.0, 3.0), (1.0, -1.2)):
        out = rk.ppo_loss(x, EYE, y, old, torch.full((10,), sign).double(), dual_clip=3.0)
        assert out.loss.item() == pytest.approx(expected, rel=1e-9)
        assert not torch.autograd.grad(out.loss, x)[0].any()
    free = rk.ppo_loss(x, EYE, y, old, torch.ones(10).double(), dual_clip=3.0, clip=(0.2, math.inf))
    assert free.loss.item() == pytest.approx(-math.exp(2.0), rel=1e-9)


def test_temperature_comes_before_the_softmax():
    """The policy that sampled had its logits divided; dividing log-probabilities instead is another policy."""
    x, y, _ = rows()
    old = logp_of(x.detach(), y, 0.7) - 0.1
    ratio = (logp_of(x, y, 0.7) - old).exp()
    assert rk.ppo_loss(x, EYE, y, old, ADVANTAGES, temperature=0.7).metrics["ratio"].item() == pytest.approx(
        math.exp(0.1), rel=1e-9
    )
    expected = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES).mean()
    same(rk.ppo_loss(x, EYE, y, old, ADVANTAGES, temperature=0.7), expected, x)


def test_on_policy_means_ratio_one_with_the_gradient_of_reinforce():
    x, y, _ = rows()
    out = rk.ppo_loss(x, EYE, y, None, ADVANTAGES)
    assert out.metrics["ratio"] == 1
    assert out.metrics["approx_kl"] == 0
    (got,) = torch.autograd.grad(out.loss, x)
    (want,) = torch.autograd.grad(-(ADVANTAGES * logp_of(x, y)).mean(), x)
    torch.testing.assert_close(got, want)


def test_clipped_and_zero_advantage_tokens_are_exactly_silent():
    """Not merely small: the engine skips rows whose gradient is zero, so a stray 1e-20 would cost two GEMMs."""
    x, y, _ = rows()
    log_ratio = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.1, -0.1, 0.0, 1.0], dtype=torch.float64)
    old = logp_of(x, y).detach() - log_ratio
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    out = rk.ppo_loss(x, EYE, y, old, advantages)
    alive = torch.autograd.grad(out.loss, x)[0].ne(0).any(1)
    assert alive.tolist() == [False, True, True, False, False, True, True, True, True, False]
    assert out.metrics["clipfrac"].item() == pytest.approx(0.2)
    assert out.metrics["clipfrac_high"].item() == pytest.approx(0.1)
    assert out.metrics["clipfrac_low"].item() == pytest.approx(0.1)


def test_a_ratio_that_overflows_keeps_the_loss_finite():
    x, y, _ = rows()
    old = torch.full((10,), -2000.0, dtype=torch.float64)
    out = rk.ppo_loss(x, EYE, y, old, torch.ones(10).double(), ref_logp=old, kl_coef=0.1)
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
    far = torch.zeros(10).double()
    out = rk.ppo_loss(
        x.detach().float().requires_grad_(),
        EYE.float(),
        y,
        far - 300,
        ADVANTAGES.float(),
        ref_logp=far + 300,
        kl_coef=0.1,
    )
    assert all(m.isfinite() for m in out.metrics.values())
    assert out.loss.isfinite()


def test_token_weight_scales_the_whole_token_and_not_the_denominator():
    """An importance weight corrects the expectation of everything the token contributes, KL and entropy included."""
    x, y, old = rows()
    logp, weight = logp_of(x, y), torch.linspace(0, 2, 10, dtype=torch.float64)
    ratio = (logp - old).exp()
    entropy = -(x.log_softmax(-1).exp() * x.log_softmax(-1)).sum(-1)
    token = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES)
    token = token + 0.3 * 0.5 * (logp - old).square() - 0.01 * entropy
    out = rk.ppo_loss(
        x, EYE, y, old, ADVANTAGES, token_weight=weight, ref_logp=old, kl="k2", kl_coef=0.3, entropy_coef=0.01
    )
    same(out, (weight * token).sum() / 10, x)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_micro_batches_add_up_to_the_batch(reduction):
    """Global denominators: averaging micro-batch means weighs a short micro-batch's tokens more (scar of many)."""
    x, y, old = rows()
    y = y.clone()
    y[4:7] = -100
    whole = rk.grpo_loss(x, EYE, y, old, ADVANTAGES, reduction=reduction, cu_seqlens=CU).loss
    counts = {"num_tokens": 7, "num_sequences": torch.tensor(4)}
    a = rk.grpo_loss(x[:5], EYE, y[:5], old[:5], ADVANTAGES[:5], reduction=reduction, cu_seqlens=CU[:3], **counts).loss
    b = rk.grpo_loss(
        x[5:], EYE, y[5:], old[5:], ADVANTAGES[5:], reduction=reduction, cu_seqlens=CU[2:] - 5, **counts
    ).loss
    same(a + b, whole, x)


def test_what_stands_at_ignored_positions_never_matters():
    x, y, old = rows()
    y = y.clone()
    y[[1, 6]] = -100
    bad = torch.tensor([1, 6])
    clean = rk.ppo_loss(x, EYE, y, old, ADVANTAGES, ref_logp=old, kl_coef=0.1, token_weight=torch.ones(10))
    poison = [t.clone().index_fill(0, bad, math.nan) for t in (old, ADVANTAGES, torch.ones(10))]
    out = rk.ppo_loss(x, EYE, y, poison[0], poison[1], ref_logp=poison[0], kl_coef=0.1, token_weight=poison[2])
    assert out.loss == clean.loss
    assert out.metrics == clean.metrics
    assert out.metrics["entropy"] > 0


# KL estimators
