"""Losses and metrics whose numbers were worked out by hand: the head is the identity, hidden states are logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

LOG2 = math.log(2)


def policy(
    ratios: list[float], advantages: list[float], *, targets: list[int] | None = None, loss=rk.ppo_loss, **kwargs
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Every token has probability 1/2 now; (loss, d loss / d logp of each token, metrics)."""
    hidden = torch.zeros(len(ratios), 2, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-LOG2 - math.log(r) for r in ratios], dtype=torch.float64)
    chosen = torch.zeros(len(ratios), dtype=torch.long) if targets is None else torch.tensor(targets)
    weight = torch.eye(2, dtype=torch.float64)
    out = loss(hidden, weight, chosen, old, torch.tensor(advantages, dtype=torch.float64), **kwargs)
    out.loss.backward()
    assert hidden.grad is not None
    return out.loss.detach(), 2 * hidden.grad[:, 0], out.metrics  # d logp / d z = 1 - p = 1/2


def close(got: Tensor, expected: list[float] | float) -> None:
    want = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-12), f"{got.tolist()} is not {expected}"


def test_clip_is_pessimistic():
    """The minimum of the two surrogates: clipping only ever takes gradient away where it would overshoot."""
    loss, grad, metrics = policy([1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0], clip=(0.1, 0.2))
    close(loss, -(1.2 + 0.5 - 1.5 - 0.9) / 4)
    close(grad, [0.0, -0.5 / 4, 1.5 / 4, 0.0])
    close(metrics["clipfrac"], 0.5)


def test_dual_clip_only_where_the_advantage_is_negative():
    """Ye et al. 2020 and verl. TRL's and Liger's delta caps the ratio for every sign, which also caps what is good."""
    loss, grad, _ = policy([5.0, 5.0], [-1.0, 1.0], dual_clip=3.0, clip=(0.2, 9.0))
    close(loss, (3.0 - 5.0) / 2)
    close(grad, [0.0, -5.0 / 2])


def test_cispo_bounds_are_distances_from_one_on_both_sides():
    """As everywhere else here. Liger and TRL read epsilon_high as an absolute bound and have no lower one."""
    loss, grad, _ = policy([3.0, 0.1, 1.1], [1.0, 1.0, -1.0], clip_rule="cispo", clip=(0.5, 1.0))
    weights = [2.0, 0.5, -1.1]
    close(grad, [-w / 3 for w in weights])
    close(loss, sum(w * LOG2 for w in weights) / 3)


def test_gspo_pools_log_ratios_over_the_kept_tokens():
    """The geometric mean; each token's gradient is the sequence's ratio times its own advantage (GSPO eq. 14)."""
    cu = torch.tensor([0, 3, 4])
    args = ([2.0, 8.0, 5.0, 1.0], [1.0, 0.5, 9.0, -1.0])
    kwargs = {"targets": [0, 0, -100, 0], "ratio": "sequence", "cu_seqlens": cu, "clip": (0.9, 9.0)}
    loss, grad, _ = policy(*args, reduction="sequence_mean", **kwargs)
    close(loss, (-4.0 * 0.75 + 1.0) / 2)
    close(grad, [-4.0 / 4, -2.0 / 4, 0.0, 1.0 / 2])


def test_a_sequence_without_kept_tokens_is_not_in_the_denominator():
    """verl and OpenRLHF; Liger and TRL count it, so that masking a truncated reply dilutes all the others."""
    cu = torch.tensor([0, 2, 2, 4, 5])
    kwargs = {"targets": [0, 0, -100, -100, 0], "cu_seqlens": cu}
    loss, _, _ = policy([1.0] * 5, [1.0, 3.0, 9.0, 9.0, 5.0], reduction="sequence_mean", **kwargs)
    close(loss, -(2.0 + 5.0) / 2)
    loss, _, _ = policy([1.0] * 5, [1.0, 3.0, 9.0, 9.0, 5.0], reduction="sequence_sum", **kwargs)
    close(loss, -(4.0 + 5.0) / 2)
    loss, _, _ = policy([1.0] * 5, [1.0, 3.0, 9.0, 9.0, 5.0], **kwargs)
    close(loss, -9.0 / 3)


@pytest.mark.parametrize(("kl", "value", "slope"), [
    ("k2", LOG2**2 / 2, LOG2),
    ("k3", 0.5 - 1 + LOG2, 1 - 0.5),
    ("k1+", LOG2, LOG2),
    ("k3+", 0.5 - 1 + LOG2, LOG2),
])  # fmt: skip
def test_kl_estimators(kl, value, slope):
    """pi / ref = 2. A plus has k2's gradient, which is unbiased; k3's is that of a forward KL."""
    ref = torch.tensor([-2 * LOG2], dtype=torch.float64)
    loss, grad, metrics = policy([1.0], [0.0], ref_logp=ref, kl=kl, kl_coef=0.5)
    close(loss, 0.5 * value)
    close(grad, [0.5 * slope])
    close(metrics["kl"], value)


def test_metrics_are_means_over_kept_tokens():
    """Padding dilutes nothing (TRL #2022: entropy went negative)."""
    nan = math.nan
    _, _, few = policy([2.0, 0.5], [1.0, 1.0], entropy_coef=0.1)
    _, _, padded = policy([2.0, 1.0, 0.5, 1.0], [1.0, nan, 1.0, nan], targets=[0, -100, 0, -100], entropy_coef=0.1)
    close(few["entropy"], LOG2)
    close(few["approx_kl"], ((2 - 1 - LOG2) + (0.5 - 1 + LOG2)) / 2)
    close(few["clipfrac"], 0.5)
    for name, value in few.items():
        close(padded[name], float(value))


def preference(loss, logits: list[list[float]], *args, **kwargs):
    hidden = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(len(logits), dtype=torch.long)
    return loss(hidden, torch.eye(2, dtype=torch.float64), targets, *args, **kwargs)


def test_preference_metrics_say_who_won():
    cu, ref = torch.tensor([0, 1, 2, 3, 4]), torch.zeros(4, dtype=torch.float64)
    out = preference(rk.dpo_loss, [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5, 0.0]], cu, ref)
    close(out.metrics["accuracy"], 0.5)
