"""A bound on the kept rows spares the GPU a question and changes nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.engine.span import Span
from tests.support.problems import Problem, make_problem, ref_logp, rollout, small_budget

BOUNDS = pytest.mark.parametrize("spare", [0, 5, 10**6])


def problem(seed: int = 70) -> Problem:
    """Ignored rows hold NaN: nothing of them may be looked at, and the first row is one of them."""
    p = make_problem(seed=seed)
    p.targets[0] = -100
    p.hidden[~p.kept] = torch.nan
    return p


def run(p: Problem, loss, *args, **options):
    x, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    out = loss(x, w, p.targets, *args, **options)
    (1.7 * out.loss).backward()
    return {"loss": out.loss.detach(), "hidden": x.grad, "weight": w.grad, **out.metrics}


@BOUNDS
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("name", ["ppo", "sft", "exact-kl"])
def test_losses_do_not_know(backend, name, pieces, spare):
    p = problem()
    old, advantages = rollout(p)
    ref = torch.randn(p.hidden.shape), torch.randn(p.weight.shape)
    each = p.per_token(0.5 + torch.rand(p.targets.shape))
    loss, args, options = {
        "ppo": (rk.ppo_loss, (old, advantages), {"entropy_coef": 0.1, "ref_logp": ref_logp(p), "kl_coef": 0.2}),
        "sft": (rk.sft_loss, (), {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": each}),
        "exact-kl": (rk.ppo_loss, (None, advantages), {"ref": ref, "kl": "exact", "kl_coef": 0.3}),
    }[name]
    options |= {"backend": backend, "max_bytes": small_budget(p) if pieces else None}
    plain = run(p, loss, *args, **options)
    bounded = run(p, loss, *args, max_targets=int(p.kept.sum()) + spare, **options)
    assert plain.keys() == bounded.keys()
    for key, value in plain.items():
        assert torch.allclose(value, bounded[key], rtol=2e-5, atol=2e-6), key
    assert not bounded["hidden"][~p.kept].any()


@BOUNDS
def test_statistics_do_not_know(backend, spare):
    p = problem()
    found = []
    for most in (None, int(p.kept.sum()) + spare):
        x = p.hidden.clone().requires_grad_()
        stats = rk.token_stats(x, p.weight, p.targets, max_targets=most, backend=backend)
        (stats.logp.sum() + 0.3 * stats.entropy.sum()).backward()
        found.append((*stats[:5], x.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_ids_of_several_kinds(backend):
    p = problem()
    ids = p.targets[:, None].repeat(1, 3)
    ids[3:9, 1] = -100
    plain = rk.token_logps(p.hidden, p.weight, ids, backend=backend)
    bounded = rk.token_logps(p.hidden, p.weight, ids, max_targets=40, backend=backend)
    assert torch.allclose(plain, bounded, atol=1e-6)


def test_nothing_left(backend):
    p = problem()
    p.targets[:] = -100
    found = run(p, rk.sft_loss, max_targets=4, backend=backend)
    assert found["loss"] == 0
    assert not found["hidden"].any()
    assert not found["weight"].any()


def test_a_bound_that_is_too_low_is_said():
    p = problem()
    with pytest.raises(ValueError, match=rf"max_targets: got 3, wants at least.*here {int(p.kept.sum())}"):
        rk.sft_loss(p.hidden, p.weight, p.targets, max_targets=3)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "8"])
def test_a_bound_is_a_number(bad):
    p = problem()
    with pytest.raises(ValueError, match=r"max_targets: got .*, wants a positive whole number"):
        rk.sft_loss(p.hidden, p.weight, p.targets, max_targets=bad)


def test_whole_sequences_cannot_be_bounded():
    p = make_problem(lengths=(5, 3), silent_sequences=0)
    with pytest.raises(ValueError, match=r"max_targets: .* wants None where a loss needs whole sequences"):
        rk.dpo_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, ref_logp(p), max_targets=8)


@pytest.mark.parametrize("max_bytes", [None, 30_000])
def test_what_a_tolerance_leaves_goes_back_to_its_own_rows(backend, max_bytes):
    p = make_problem(seed=78, scale=6.0, vocab=400, lengths=(20, 24))
    p.targets[::3] = -100
    found = []
    for most in (None, 44, int((p.targets >= 0).sum())):
        x, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        x.data[1::5] *= 0.01
        options = {"tolerance": 0.02, "max_targets": most, "max_bytes": max_bytes, "backend": backend}
        out = rk.sft_loss(x, w, p.targets, **options)
        out.loss.backward()
        assert 0 < out.metrics["tolerance/dense"] < 1
        found.append((x.grad, w.grad))
    for grads in found[1:]:
        for got, want in zip(grads, found[0], strict=True):
            assert (got - want).norm() <= 0.05 * want.norm()
        assert (grads[0][p.targets < 0] == 0).all()


@pytest.mark.parametrize(
    ("gpu", "rows", "options", "looks"),
    [
        (False, 1, {}, True),  # on a CPU nobody waits
        (True, 1, {}, False),
        (True, 1000, {}, True),  # two products of 1000 rows are 1e12 operations
        (True, 1000, {"max_targets": 1000}, False),
        (True, 1, {"tolerance": 0.01}, True),
        (True, 1, {"tolerance": 0.01, "max_targets": 1000}, True),
    ],
)
def test_rows_without_a_gradient_are_looked_for_where_that_is_worth_a_wait(gpu, rows, options, looks):
    real = torch.ones(rows, dtype=torch.bool) if "max_targets" in options else None
    call = SimpleNamespace(
        tolerance=options.get("tolerance"), overwrite=False, kept=SimpleNamespace(real=real),
        head=SimpleNamespace(weight=torch.empty(250_000, 1000, device="meta")), hidden=SimpleNamespace(is_cuda=gpu),
    )  # fmt: skip
    assert Span._counts(SimpleNamespace(call=call), rows) is looks  # type: ignore[arg-type]
