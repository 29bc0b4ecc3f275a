"""What holds of every loss that meets the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import PAIRS, Problem, check, make_problem, ref_logp, rollout, small_budget


def every_loss(p: Problem) -> dict[str, tuple[Callable[..., Any], Callable[..., Tensor], tuple]]:
    """Each loss with its positional arguments, for what holds of all of them."""
    old, advantages = rollout(p)
    cu, ref = p.cu_seqlens, ref_logp(p)
    desirable = torch.arange(p.num_sequences) % 2 == 0
    return {
        "ppo": (rk.ppo_loss, reference.ppo_loss, (old, advantages)),
        "grpo": (rk.grpo_loss, reference.grpo_loss, (old, advantages)),
        "dpo": (rk.dpo_loss, reference.dpo_loss, (cu, ref)),
        "ipo": (rk.ipo_loss, reference.ipo_loss, (cu, ref)),
        "kto": (rk.kto_loss, reference.kto_loss, (cu, ref, desirable, 0.1)),
        "orpo": (rk.orpo_loss, reference.orpo_loss, (cu,)),
        "simpo": (rk.simpo_loss, reference.simpo_loss, (cu,)),
        "sft": (rk.sft_loss, reference.sft_loss, ()),
    }


EVERY = pytest.mark.parametrize("name", list(every_loss(make_problem(lengths=PAIRS, silent_sequences=2))))


@EVERY
def test_float64(backend, name):
    p = make_problem(torch.float64, seed=51, lengths=PAIRS, silent_sequences=2, scale=1.0)
    loss, oracle, args = every_loss(p)[name]
    check(loss, oracle, p, *args, backend=backend)


@EVERY
def test_all_ignored_is_zero_with_zero_gradient(backend, name):
    p = make_problem(lengths=PAIRS, silent_sequences=8)
    loss, _, args = every_loss(p)[name]
    x, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    out = loss(x, w, p.targets, *args, backend=backend)
    assert out.loss == 0
    out.loss.backward()
    assert not x.grad.any()
    assert not w.grad.any()
    assert all(v.isfinite() for v in out.metrics.values()), out.metrics


@EVERY
def test_metrics_are_detached_scalars_and_do_not_depend_on_pieces(backend, name):
    p = make_problem(seed=52, lengths=PAIRS, silent_sequences=2)
    loss, _, args = every_loss(p)[name]
    w = p.weight.requires_grad_()
    outs = [loss(p.hidden, w, p.targets, *args, backend=backend, max_bytes=b) for b in (None, small_budget(p))]
    assert outs[0].metrics
    for key, value in outs[0].metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert torch.allclose(value.double(), outs[1].metrics[key].double(), rtol=1e-5, atol=1e-6), key


@EVERY
def test_two_runs_give_the_same_bits(backend, name):
    p = make_problem(seed=55, lengths=PAIRS, silent_sequences=2)
    loss, _, args = every_loss(p)[name]
    found = []
    for _ in range(2):
        x, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        out = loss(x, w, p.targets, *args, backend=backend, max_bytes=small_budget(p))
        out.loss.backward()
        found.append([out.loss.detach(), x.grad, w.grad, *out.metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@EVERY
def test_a_tolerance_is_an_option_and_says_what_was_lost(backend, name):
    p = make_problem(seed=56, lengths=PAIRS, silent_sequences=2)
    loss, _, args = every_loss(p)[name]
    out = loss(p.hidden.requires_grad_(), p.weight, p.targets, *args, tolerance=0.2, backend=backend)
    assert 0 <= out.metrics["tolerance/lost"] <= 0.2
    assert 0 <= out.metrics["tolerance/dense"] <= 1
    assert "tolerance/lost" not in loss(p.hidden, p.weight, p.targets, *args, backend=backend).metrics


@EVERY
def test_micro_batches_with_global_denominators_add_up(name):
    """Two halves of a batch, each given the denominators of the whole, are the whole."""
    p = make_problem(torch.float64, seed=53, lengths=PAIRS, silent_sequences=2)
    loss, _, args = every_loss(p)[name]
    cut, n = int(p.cu_seqlens[4]), p.targets.numel()
    chosen = int(p.kept[: int(p.cu_seqlens[1])].sum() + p.kept[int(p.cu_seqlens[2]) : int(p.cu_seqlens[3])].sum())
    chosen += int(p.kept[int(p.cu_seqlens[4]) : int(p.cu_seqlens[5])].sum())
    tokens = {"num_tokens": int(p.kept.sum())}
    denominators = {
        "ppo": tokens, "grpo": tokens, "sft": tokens, "kto": {"num_sequences": 6},
        "orpo": {"num_pairs": 3, "num_tokens": chosen},
    }.get(name, {"num_pairs": 3})  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for rows, sequences in ((slice(0, cut), slice(0, 4)), (slice(cut, n), slice(4, 8))):
        cu = p.cu_seqlens[sequences.start : sequences.stop + 1] - p.cu_seqlens[sequences.start]
        part = [
            cu if a is p.cu_seqlens else a[rows] if a.numel() == n else a[sequences]
            for a in args if isinstance(a, Tensor)
        ] + [a for a in args if not isinstance(a, Tensor)]  # fmt: skip
        total += loss(p.hidden[rows], p.weight, p.targets[rows], *part, **denominators).loss
    whole = loss(p.hidden, p.weight, p.targets, *args).loss
    assert abs(total - whole) <= 1e-12 * max(1.0, abs(whole))


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo"])
@pytest.mark.parametrize("side", [2, 3], ids=["chosen", "rejected"])
def test_a_pair_with_one_empty_side_is_no_pair(backend, name, side):
    """Its answer cannot be preferred to nothing; only ORPO's likelihood still learns from a chosen one."""
    p = make_problem(seed=54, lengths=PAIRS, silent_sequences=2, scale=1.0)
    p.targets[int(p.cu_seqlens[side]) : int(p.cu_seqlens[side + 1])] = -100
    loss, oracle, args = every_loss(p)[name]
    check(loss, oracle, p, *args, backend=backend)
