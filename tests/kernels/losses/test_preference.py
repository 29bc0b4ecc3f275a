"""Where trainers disagree about pairs, rankings and values: each test says which meaning we chose, and why."""

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from tests.support.identity_head import CU, EYE, logp_of, per_sequence, rows, same

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


# Supervised


# Reward models


# Values


# Nothing to learn from
