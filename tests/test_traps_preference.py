"""Where trainers disagree about pairs, rankings and values: each test says which meaning we chose, and why."""

import math

import pytest
import torch
import torch.nn.functional as F
from identity_head import ADVANTAGES, CU, EYE, V, logp_of, per_sequence, rows, same

import rlhf_kernels as rk

# Preference losses


def pair_log_ratios(x, y, ref, normalize=False):
    sums = per_sequence((logp_of(x, y) - ref) * (y != -100))
    sums = sums / per_sequence((y != -100).double()).clamp(min=1) if normalize else sums
    return sums[0::2] - sums[1::2]


def test_ipo_is_length_normalised_unless_told_otherwise():
    """TRL averages, OpenRLHF sums. The paper's target gap 1/(2 beta) does not grow with length, so ratios must not."""
    x, y, ref = rows()
    for normalize in (True, False):
        expected = (pair_log_ratios(x, y, ref, normalize) - 1 / (2 * 0.3)).square().mean()
        kwargs = {} if normalize else {"length_normalize": False}
        same(rk.ipo_loss(x, EYE, y, CU, ref, beta=0.3, **kwargs), expected, x)


def test_dpo_is_summed_unless_told_otherwise():
    x, y, ref = rows()
    for normalize in (False, True):
        expected = -F.logsigmoid(0.2 * pair_log_ratios(x, y, ref, normalize)).mean()
        same(rk.dpo_loss(x, EYE, y, CU, ref, beta=0.2, length_normalize=normalize), expected, x)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_label_smoothing_mixes_in_the_flipped_pair(loss):
    """Conservative DPO: TRL does so for sigmoid, Liger drops the argument. The mixture is defined for hinge as well."""
    x, y, ref = rows()
    u = 0.9 * pair_log_ratios(x, y, ref)
    f = {"sigmoid": lambda u: -F.logsigmoid(u), "hinge": lambda u: (1 - u).clamp(min=0)}[loss]
    out = rk.dpo_loss(x, EYE, y, CU, ref, beta=0.9, loss=loss, label_smoothing=0.2)
    same(out, (0.8 * f(u) + 0.2 * f(-u)).mean(), x)


def test_ref_logp_per_sequence_is_already_summed():
    x, y, ref = rows()
    same(rk.dpo_loss(x, EYE, y, CU, per_sequence(ref)), rk.dpo_loss(x, EYE, y, CU, ref).loss, x)


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


def test_dpo_and_bradley_terry_survive_differences_of_500():
    """log(1 + exp(500)) overflows float32 in trainers that write it out."""
    for sign in (500.0, -500.0):
        scores = torch.tensor([sign, -sign], requires_grad=True)
        out = rk.bradley_terry_loss(scores)
        out.loss.backward()
        assert out.loss.item() == (0.0 if sign > 0 else 1000.0)
        assert scores.grad.tolist() == ([0.0, 0.0] if sign > 0 else [-1.0, 1.0])
    x, y, _ = rows()
    x = x.detach().float().requires_grad_()
    ref = torch.tensor([0.0, 5000.0, 0.0, 5000.0])
    out = rk.dpo_loss(x, EYE.float(), y, CU, ref - 2500)
    assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
    assert out.loss.isfinite()


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


def test_orpo_divides_likelihood_by_tokens_and_odds_by_pairs():
    """Eq. 6: the first term is language modelling of the chosen replies, the second one number per pair."""
    x, y, _ = rows()
    logp = logp_of(x, y)
    mean = per_sequence(logp) / CU.diff()
    odds = mean - torch.log1p(-mean.exp())
    expected = -(logp[:3].sum() + logp[5:9].sum()) / 7 - 0.4 * F.logsigmoid(odds[0::2] - odds[1::2]).mean()
    same(rk.orpo_loss(x, EYE, y, CU, beta=0.4), expected, x)


def test_simpo_margin_is_a_reward_and_not_a_log_ratio():
    """Eq. 6: gamma stands beside the beta-scaled rewards; in TRL it is ``gamma / beta`` beside the means."""
    x, y, _ = rows()
    mean = per_sequence(logp_of(x, y)) / CU.diff()
    expected = -F.logsigmoid(2.5 * (mean[0::2] - mean[1::2]) - 1.2).mean()
    same(rk.simpo_loss(x, EYE, y, CU, beta=2.5, margin=1.2), expected, x)


def test_sft_coef_is_per_pair_and_length_normalised():
    x, y, ref = rows()
    logp = logp_of(x, y)
    nll = -(logp[:3].mean() + logp[5:9].mean()) / 2
    expected = -F.logsigmoid(0.1 * pair_log_ratios(x, y, ref)).mean() + 0.7 * nll
    same(rk.dpo_loss(x, EYE, y, CU, ref, sft_coef=0.7), expected, x)


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


def test_odd_number_of_preference_sequences_is_refused():
    x, y, ref = rows()
    with pytest.raises(ValueError, match="cu_seqlens"):
        rk.dpo_loss(x, EYE, y, torch.tensor([0, 3, 5, 10]), ref)


# Supervised


def test_label_smoothing_spreads_over_the_whole_vocabulary():
    """Szegedy et al.: eps goes to all V tokens, the target included, as in torch's own cross-entropy."""
    x, y, _ = rows()
    same(rk.sft_loss(x, EYE, y, label_smoothing=0.3), F.cross_entropy(x, y, label_smoothing=0.3), x)
    z = F.cross_entropy(x, y) + 0.02 * x.logsumexp(-1).square().mean()
    same(rk.sft_loss(x, EYE, y, z_loss=0.02), z, x)


# Reward models


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


# Values


def test_value_loss_is_half_the_larger_square():
    """Half, as baselines and lm-human-preference-details have it: the coefficient of a recipe assumes it."""
    v = torch.tensor([1.0, 1.0, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, -1.0, 0.5, 5.0], dtype=torch.float64)
    old = torch.zeros(4, dtype=torch.float64)
    clipped = v.clamp(-0.2, 0.2)
    expected = 0.5 * torch.maximum((v - returns).square(), (clipped - returns).square()).mean()
    out = rk.value_loss(v, returns, old_values=old, clip=0.2)
    same(out, expected, v)
    assert out.metrics["clipfrac"].item() == pytest.approx(0.25)  # only where the clipped square is the larger
    unexplained = (returns - v).var(correction=0) / returns.var(correction=0)
    assert out.metrics["explained_var"].item() == pytest.approx(1 - unexplained.item())


def test_masked_values_never_matter_even_when_they_are_nan():
    v = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    out = rk.value_loss(v, torch.tensor([0.0, math.nan, 1.0]), mask=torch.tensor([True, False, True]))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.5 * (1 + 4) / 2)
    assert v.grad.tolist() == [0.5, 0.0, 1.0]


# Nothing to learn from


@pytest.mark.parametrize("name", ["ppo", "gspo", "sft", "dpo", "ipo", "orpo", "simpo", "kto"])
def test_all_masked_is_a_zero_loss_with_a_zero_gradient(name):
    x, _, ref = rows()
    y = torch.full((10,), -100)
    out = {
        "ppo": lambda: rk.ppo_loss(x, EYE, y, ref, ADVANTAGES, ref_logp=ref, kl_coef=0.1, entropy_coef=0.1),
        "gspo": lambda: rk.grpo_loss(
            x, EYE, y, ref, torch.ones(4), ratio="sequence", reduction="sequence_mean", cu_seqlens=CU
        ),
        "sft": lambda: rk.sft_loss(x, EYE, y, label_smoothing=0.1, z_loss=0.1),
        "dpo": lambda: rk.dpo_loss(x, EYE, y, CU, ref, sft_coef=0.1),
        "ipo": lambda: rk.ipo_loss(x, EYE, y, CU, ref),
        "orpo": lambda: rk.orpo_loss(x, EYE, y, CU),
        "simpo": lambda: rk.simpo_loss(x, EYE, y, CU),
        "kto": lambda: rk.kto_loss(x, EYE, y, CU, ref, torch.ones(4, dtype=torch.bool), 0.0),
    }[name]()
    out.loss.backward()
    assert out.loss == 0
    assert x.grad is not None
    assert not x.grad.any()
    assert all(m.isfinite() for m in out.metrics.values())
    assert rk.value_loss(torch.ones(2), torch.zeros(2), mask=torch.zeros(2, dtype=torch.bool)).loss == 0
    assert rk.sft_loss(x, EYE, y, num_tokens=0).loss == 0
