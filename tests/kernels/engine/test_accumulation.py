"""Gradients straight into a float32 buffer, and rows whose gradient is exactly zero."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import assert_gradient, leaves, make_problem, small_budget

BUDGET = pytest.mark.parametrize("tight", [False, True], ids=["stash", "recompute"])


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote to is not zero."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def token_nll(stats, cu_seqlens):
    return -stats.logp.sum(), {}


def exact_gradients(p, factor, double=True, **kwargs):
    x = leaves(p, torch.float64 if double else None)
    (-factor * reference.token_stats(x["hidden"], x["weight"], p.targets, **kwargs).logp.sum()).backward()
    return x["hidden"].grad, x["weight"].grad


@BUDGET
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_fused_loss_adds_to_the_buffer_in_the_forward_pass(backend, tight, half):
    p = make_problem(half, seed=31)
    buffer = torch.full(p.weight.shape, 0.25)
    x = leaves(p)
    out = rk.fused_loss(
        x["hidden"], x["weight"], p.targets, token_nll, weight_grad=buffer, loss_scale=0.5,
        max_bytes=small_budget(p) if tight else None, backend=backend,
    )  # fmt: skip
    at_forward = buffer.clone()
    (0.5 * out.loss).backward()
    assert torch.equal(buffer, at_forward)
    assert x["weight"].grad is None
    exact, plain = exact_gradients(p, 0.5), exact_gradients(p, 0.5, double=False, dtype=half)
    assert_gradient("hidden", x["hidden"].grad, exact[0], plain[0], half)
    assert_gradient("buffer", buffer - 0.25, exact[1], plain[1].float() + 2e-7 * exact[1].abs().max(), half)


@BUDGET
def test_token_stats_adds_to_the_buffer_in_the_backward_pass(backend, tight):
    p = make_problem(seed=32)
    buffer = torch.zeros(p.weight.shape)
    x = leaves(p)
    budget = small_budget(p) if tight else None
    stats = rk.token_stats(x["hidden"], x["weight"], p.targets, weight_grad=buffer, max_bytes=budget, backend=backend)
    assert not buffer.any()
    (-3 * stats.logp.sum()).backward()
    assert x["weight"].grad is None
    exact, plain = exact_gradients(p, 3.0), exact_gradients(p, 3.0, double=False, dtype=torch.float32)
    assert_gradient("hidden", x["hidden"].grad, exact[0], plain[0], torch.float32)
    assert_gradient("buffer", buffer, exact[1], plain[1], torch.float32)


def test_micro_batches_add_up_in_the_buffer(backend):
    """Three calls into one bf16 model's buffer lose nothing to bf16 sums."""
    p = make_problem(torch.bfloat16, seed=33)
    whole, parts = torch.zeros(p.weight.shape), torch.zeros(p.weight.shape)
    rk.ppo_loss(
        p.hidden,
        p.weight.requires_grad_(),
        p.targets,
        None,
        torch.ones(p.targets.shape),
        weight_grad=whole,
        num_tokens=30,
        backend=backend,
    ).loss.backward()
    for rows in (slice(0, 11), slice(11, 12), slice(12, None)):
        rk.ppo_loss(
            p.hidden[rows],
            p.weight,
            p.targets[rows],
            None,
            torch.ones(p.targets[rows].shape),
            weight_grad=parts,
            num_tokens=30,
            backend=backend,
        ).loss.backward()
    assert (whole - parts).norm() <= 2.0**-8 * whole.norm()
    assert p.weight.grad is None


def test_an_upstream_gradient_that_contradicts_loss_scale_is_found(backend):
    """The buffer already holds loss_scale times the gradient; another factor from above would be wrong in silence."""
    p = make_problem(seed=34)
    x = leaves(p)
    out = rk.fused_loss(
        x["hidden"], x["weight"], p.targets, token_nll, weight_grad=torch.zeros(p.weight.shape), loss_scale=0.5,
        backend=backend,
    )  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match="loss_scale"):
        (2.0 * out.loss).backward()


@BUDGET
def test_rows_with_zero_gradient_are_exact(backend, dtype, tight):
    """Clipped and zero-advantage rows are skipped; the rest must not notice."""
    p = make_problem(dtype, seed=35)
    budget = small_budget(p) if tight else None
    weights = p.normal(p.targets.numel())
    weights[::2] = 0
    x = leaves(p)
    stats = rk.token_stats(x["hidden"], x["weight"], p.targets, max_bytes=budget, backend=backend)
    (weights * stats.logp).sum().backward()
    assert not x["hidden"].grad[::2].any()
    exact, plain = leaves(p, torch.float64), leaves(p)
    for y, precision in ((exact, torch.float64), (plain, dtype)):
        stats = reference.token_stats(y["hidden"], y["weight"], p.targets, dtype=precision)
        (weights.to(stats.logp.dtype) * stats.logp).sum().backward()
    for name in ("hidden", "weight"):
        assert_gradient(name, x[name].grad, exact[name].grad, plain[name].grad, dtype)


def test_all_gradients_zero(backend):
    p = make_problem()
    x = leaves(p)
    rk.ppo_loss(
        x["hidden"], x["weight"], p.targets, None, torch.zeros(p.targets.shape), backend=backend
    ).loss.backward()
    assert not x["hidden"].grad.any()
    assert not x["weight"].grad.any()


@BUDGET
def test_own_gradient_is_the_sum_rounded_once(backend, tight, dtype, poisoned):
    """To the bit what a float32 buffer would have collected, though the first rows, a whole piece, have none."""
    p = make_problem(dtype, seed=36)
    budget = small_budget(p) if tight else None
    weights = p.normal(p.targets.numel())
    weights[:20] = 0

    def nll(stats, cu_seqlens, weights):
        return (weights * stats.logp).sum(), {}

    def fused(x, buffer):
        options = {"weight_grad": buffer, "max_bytes": budget, "backend": backend}
        rk.fused_loss(x["hidden"], x["weight"], p.targets, nll, per_token=(weights,), **options).loss.backward()

    def stats(x, buffer):
        options = {"weight_grad": buffer, "max_bytes": budget, "backend": backend}
        (weights * rk.token_stats(x["hidden"], x["weight"], p.targets, **options).logp).sum().backward()

    for way in (fused, stats):
        own, into, buffer = leaves(p), leaves(p), torch.zeros(p.weight.shape)
        way(own, None)
        way(into, buffer)
        assert buffer.any()
        assert torch.equal(own["weight"].grad, buffer.to(dtype))
        assert torch.equal(own["hidden"].grad, into["hidden"].grad)


def test_nothing_to_write_is_zero(backend, dtype, poisoned):
    p = make_problem(dtype)
    targets, bias = p.targets.fill_(-100), torch.zeros(p.weight.shape[0], dtype=dtype, requires_grad=True)
    for advantages, ids in ((0.0, targets.clamp(min=1)), (1.0, targets)):
        x = leaves(p)
        factor = torch.full(ids.shape, advantages)
        (factor * rk.token_stats(x["hidden"], x["weight"], ids, bias=bias, backend=backend).logp).sum().backward()
        rk.ppo_loss(x["hidden"], x["weight"], ids, None, factor, bias=bias, backend=backend).loss.backward()
        assert not any(g.any() for g in (x["hidden"].grad, x["weight"].grad, bias.grad))
