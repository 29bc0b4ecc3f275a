"""Every loss that meets the head against the float64 oracle: every option, every backend, every dtype.

Values and gradients of hidden, weight and bias, each with the whole batch in memory and in pieces (``problems.check``).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.identity_head import ADVANTAGES, CU, EYE, rows
from tests.support.problems import PAIRS, Problem, check, make_problem, ref_logp, rollout, true_logp


def ref_model(p: Problem) -> tuple[Tensor, Tensor]:
    other = make_problem(p.hidden.dtype, lengths=tuple(p.cu_seqlens.diff().tolist()), hidden_size=17, seed=99)
    return other.hidden, other.weight


Case = Callable[[Problem], dict[str, Any]]
POLICY: dict[str, Case] = {
    "default": lambda p: {},
    "clip-asymmetric": lambda p: {"clip": (0.1, 0.4)},
    "clip-integers": lambda p: {"clip": (0, 1)},
    "dual-clip": lambda p: {"dual_clip": 1.5},
    "entropy": lambda p: {"entropy_coef": 0.3},
    "entropy-negative": lambda p: {"entropy_coef": -0.2},
    "kl-k2": lambda p: {"kl": "k2", "kl_coef": 0.4, "ref_logp": ref_logp(p)},
    "kl-k3": lambda p: {"kl": "k3", "kl_coef": 0.4, "ref_logp": ref_logp(p)},
    "kl-k1+": lambda p: {"kl": "k1+", "kl_coef": 0.4, "ref_logp": ref_logp(p)},
    "kl-k3+": lambda p: {"kl": "k3+", "kl_coef": 0.4, "ref_logp": ref_logp(p)},
    "kl-exact": lambda p: {"kl": "exact", "kl_coef": 0.4, "ref": ref_model(p)},
    "kl-exact-and-entropy": lambda p: {"kl": "exact", "kl_coef": 0.4, "ref": ref_model(p), "entropy_coef": 0.1},
    "cispo": lambda p: {"clip_rule": "cispo", "clip": (0.3, 0.2)},
    "weights": lambda p: {"token_weight": p.per_token(p.normal(p.targets.numel()).exp())},
    "sequence-mean": lambda p: {"reduction": "sequence_mean", "cu_seqlens": p.cu_seqlens},
    "sequence-sum": lambda p: {"reduction": "sequence_sum", "cu_seqlens": p.cu_seqlens},
    "tokens-int": lambda p: {"num_tokens": 100},
    "tokens-tensor": lambda p: {"num_tokens": torch.tensor(77)},
    "sequences-float": lambda p: {"reduction": "sequence_mean", "cu_seqlens": p.cu_seqlens, "num_sequences": 12.5},
    "sequences-tensor": lambda p: {
        "reduction": "sequence_sum", "cu_seqlens": p.cu_seqlens, "num_sequences": torch.tensor(9.0),
    },
    "everything": lambda p: {
        "clip": (0.15, 0.3), "dual_clip": 2.0, "entropy_coef": 0.02, "kl": "k3", "kl_coef": 0.1,
        "ref_logp": ref_logp(p), "token_weight": p.per_token(p.normal(p.targets.numel()).exp()),
        "reduction": "sequence_mean", "cu_seqlens": p.cu_seqlens,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", list(POLICY))
def test_ppo(backend, dtype, case):
    p = make_problem(dtype, seed=40)
    old, advantages = rollout(p)
    check(rk.ppo_loss, reference.ppo_loss, p, old, advantages, backend=backend, **POLICY[case](p))


@pytest.mark.parametrize("case", ["default", "dual-clip", "kl-k3", "kl-exact", "cispo", "everything"])
def test_grpo(backend, case):
    p = make_problem(seed=41)
    old, advantages = rollout(p)
    check(rk.grpo_loss, reference.grpo_loss, p, old, advantages, backend=backend, **POLICY[case](p))


def test_rollouts_reach_every_branch():
    """What the two tests above rest on: both signs of the advantage in every region of the ratio."""
    for seed in (40, 41):
        p = make_problem(seed=seed)
        old, advantages = rollout(p)
        kept = p.kept
        ratio, sign = (true_logp(p)[kept] - old[kept]).exp(), advantages[kept].sign()
        for s in (-1, 1):
            for low, high in ((0, 0.8), (0.8, 1.2), (1.2, torch.inf)):
                assert ((ratio > low) & (ratio < high) & (sign == s)).any(), (seed, s, low, high)
        assert ((ratio > 2) & (sign < 0)).any()
        assert ((ratio > 2) & (sign > 0)).any()


GRPO = {
    "gspo": {"ratio": "sequence", "reduction": "sequence_mean", "clip": (0.05, 0.1)},
    "gspo-token-mean": {"ratio": "sequence", "clip": (0.05, 0.1)},
    "gspo-dual-clip": {"ratio": "sequence", "reduction": "sequence_mean", "dual_clip": 1.1},
    "gspo-cispo": {"ratio": "sequence", "reduction": "sequence_sum", "clip": (0.05, 0.1), "clip_rule": "cispo"},
    "grpo": {"reduction": "sequence_mean"},
    "dr-grpo": {"num_tokens": 6 * 32},
    "dapo": {"clip": (0.2, 0.28)},
}


@pytest.mark.parametrize("case", list(GRPO))
def test_grpo_with_one_advantage_per_sequence(backend, dtype, case):
    lengths = (5, 1, 13, 7, 9, 8, 6, 4)
    p = make_problem(dtype, seed=42, lengths=lengths, silent_sequences=1)
    old, _ = rollout(p)
    advantages = torch.tensor([0.9, -1.1, 1.3, -0.4, 0.6, -0.8, 0.5, torch.nan])
    kwargs = GRPO[case] | {"cu_seqlens": p.cu_seqlens}
    check(rk.grpo_loss, reference.grpo_loss, p, old, advantages, backend=backend, **kwargs)


def test_on_policy(backend, dtype):
    p = make_problem(dtype, seed=43)
    _, advantages = rollout(p)
    check(rk.ppo_loss, reference.ppo_loss, p, None, advantages, backend=backend, entropy_coef=0.1)


@pytest.mark.parametrize("loss", ["ppo", "dpo", "sft"])
def test_head_options(backend, dtype, loss):
    p = make_problem(dtype, seed=44, lengths=PAIRS, silent_sequences=2, vocab_size=297)
    temperature = p.per_token(0.5 + torch.rand(p.targets.shape, generator=p.generator))
    p.options |= {"bias": p.normal(301).to(dtype), "softcap": 5.0, "logit_scale": 1.3, "temperature": temperature}
    if loss == "ppo":
        check(rk.ppo_loss, reference.ppo_loss, p, *rollout(p), backend=backend, entropy_coef=0.1)
    elif loss == "dpo":
        check(rk.dpo_loss, reference.dpo_loss, p, p.cu_seqlens, ref_logp(p), backend=backend)
    else:
        check(rk.sft_loss, reference.sft_loss, p, backend=backend, label_smoothing=0.1, z_loss=0.01)


SFT: dict[str, Case] = {
    "default": lambda p: {},
    "smoothing": lambda p: {"label_smoothing": 0.1},
    "z-loss": lambda p: {"z_loss": 0.01},
    "weights": lambda p: {"token_weight": p.per_token(p.normal(p.targets.numel()))},
    "both": lambda p: {"label_smoothing": 0.2, "z_loss": 1e-3},
    "everything": lambda p: {
        "label_smoothing": 0.2, "z_loss": 1e-3, "token_weight": p.per_token(p.normal(p.targets.numel())),
        "reduction": "sequence_mean", "cu_seqlens": p.cu_seqlens, "num_sequences": 5,
    },
    "sequence-sum": lambda p: {"reduction": "sequence_sum", "cu_seqlens": p.cu_seqlens},
    "tokens": lambda p: {"num_tokens": 50.0},
}  # fmt: skip


@pytest.mark.parametrize("case", list(SFT))
def test_sft(backend, dtype, case):
    p = make_problem(dtype, seed=45)
    check(rk.sft_loss, reference.sft_loss, p, backend=backend, **SFT[case](p))


def pair_problem(dtype: torch.dtype, seed: int) -> Problem:
    """Logits of moderate size: the gap between two answers stays where the logistic function bends."""
    return make_problem(dtype, seed=seed, lengths=PAIRS, silent_sequences=2, scale=1.0)


def summed(p: Problem, x: Tensor) -> Tensor:
    bounds = p.cu_seqlens.tolist()
    return torch.stack([x[i:j][p.kept[i:j]].sum() for i, j in pairwise(bounds)])


DPO: dict[str, Case] = {
    "default": lambda p: {},
    "beta": lambda p: {"beta": 0.7},
    "smoothing": lambda p: {"label_smoothing": 0.2},
    "hinge": lambda p: {"loss": "hinge", "beta": 0.5},
    "normalised": lambda p: {"length_normalize": True, "beta": 2.0},
    "margin": lambda p: {"margin": 0.5},
    "margin-per-pair": lambda p: {"margin": torch.tensor([0.5, -0.2, 1.0, torch.nan])},
    "hinge-smoothing": lambda p: {"loss": "hinge", "beta": 0.5, "label_smoothing": 0.1},
    "hinge-margin": lambda p: {"loss": "hinge", "margin": torch.tensor([0.5, -0.2, 1.0, 0.0])},
    "sft": lambda p: {"sft_coef": 0.3},
    "pairs": lambda p: {"num_pairs": 7},
    "pairs-tensor": lambda p: {"num_pairs": torch.tensor(3.5), "sft_coef": 0.1},
    "everything": lambda p: {"label_smoothing": 0.1, "length_normalize": True, "margin": 0.2, "sft_coef": 0.1},
}


@pytest.mark.parametrize("reference_per", ["token", "sequence"])
@pytest.mark.parametrize("case", list(DPO))
def test_dpo(backend, dtype, case, reference_per):
    p = pair_problem(dtype, 46)
    ref = ref_logp(p) if reference_per == "token" else summed(p, ref_logp(p))
    check(rk.dpo_loss, reference.dpo_loss, p, p.cu_seqlens, ref, backend=backend, **DPO[case](p))


@pytest.mark.parametrize("kwargs", [{}, {"length_normalize": False}, {"beta": 0.3}, {"num_pairs": 9}], ids=str)
def test_ipo(backend, dtype, kwargs):
    p = pair_problem(dtype, 47)
    check(rk.ipo_loss, reference.ipo_loss, p, p.cu_seqlens, ref_logp(p), backend=backend, **kwargs)
    check(rk.ipo_loss, reference.ipo_loss, p, p.cu_seqlens, summed(p, ref_logp(p)), backend=backend, **kwargs)


KTO = [
    {}, {"beta": 0.5}, {"desirable_weight": 1.3}, {"undesirable_weight": 0.6},
    {"num_sequences": 11, "desirable_weight": 0.5, "undesirable_weight": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", KTO, ids=str)
def test_kto(backend, dtype, kwargs):
    p = make_problem(dtype, seed=48, scale=1.0, lengths=(5, 1, 3, 13, 7, 9, 4, 8))
    desirable = torch.tensor([True, False, True, True, False, False, True, False])
    kl = torch.tensor(0.35)
    args = (p.cu_seqlens, ref_logp(p), desirable, kl)
    check(rk.kto_loss, reference.kto_loss, p, *args, backend=backend, **kwargs)
    args = (p.cu_seqlens, summed(p, ref_logp(p)), desirable, 0.2)
    check(rk.kto_loss, reference.kto_loss, p, *args, backend=backend, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"beta": 1.5}, {"num_pairs": 5}, {"num_tokens": 31}], ids=str)
def test_orpo(backend, dtype, kwargs):
    p = pair_problem(dtype, 49)
    check(rk.orpo_loss, reference.orpo_loss, p, p.cu_seqlens, backend=backend, **kwargs)


SIMPO = [
    {}, {"beta": 0.8}, {"margin": 0.0}, {"label_smoothing": 0.2}, {"sft_coef": 0.4},
    {"num_pairs": torch.tensor(6), "margin": 0.3, "label_smoothing": 0.1, "sft_coef": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", SIMPO, ids=str)
def test_simpo(backend, dtype, kwargs):
    p = pair_problem(dtype, 50)
    check(rk.simpo_loss, reference.simpo_loss, p, p.cu_seqlens, backend=backend, **kwargs)


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
