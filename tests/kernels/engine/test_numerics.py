"""Where numbers are hardest: huge, tiny and impossible logits, and the same bits twice."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import Problem, assert_gradient, assert_value, leaves, make_problem, small_budget


def dictated(logits: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """A problem whose logits are, up to rounding, the ones given: hidden is a rotation, weight what undoes it."""
    n, vocab = logits.shape
    rotation = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    p = make_problem(dtype, lengths=(n,), hidden_size=n, vocab=vocab, seed=seed, silent_sequences=0)
    p.hidden, p.weight = rotation.to(dtype), (logits.double().T @ rotation).to(dtype)
    p.targets = torch.arange(n) * 7 % vocab
    return p


def statistics(fn, p: Problem, double: bool = False, **kwargs):
    x = leaves(p, torch.float64 if double else None)
    options = p.options | {k: v for k, v in x.items() if k == "bias"}
    stats = fn(x["hidden"], x["weight"], p.targets, **options, **kwargs)
    (0.7 * stats.logp.sum() + stats.entropy.sum() - 0.2 * stats.lse.sum()).backward()
    return {k: getattr(stats, k).detach() for k in ("logp", "entropy", "lse")}, {k: v.grad for k, v in x.items()}


def judge(p: Problem, backend: str) -> dict[str, Tensor]:
    dtype = p.hidden.dtype
    exact, exact_grads = statistics(reference.token_stats, p, double=True)
    upcast, _ = statistics(reference.token_stats, p, dtype=torch.promote_types(dtype, torch.float32))
    _, plain_grads = statistics(reference.token_stats, p, dtype=dtype)
    for max_bytes in (None, small_budget(p)):
        got, grads = statistics(rk.token_stats, p, backend=backend, max_bytes=max_bytes)
        for name in got:
            assert_value(name, got[name], exact[name], upcast[name], dtype)
        for name in grads:
            assert_gradient(name, grads[name], exact_grads[name], plain_grads[name], dtype)
    with torch.no_grad():
        scored = rk.token_stats(p.hidden, p.weight, p.targets, **p.options, backend=backend)
    for name in exact:
        assert_value(f"scored {name}", getattr(scored, name), exact[name], upcast[name], dtype)
    return exact


def uniform(n: int, vocab: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, vocab, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(("low", "high"), [(-80, 80), (-80, -40), (30, 80), (-1e4, -9.9e3)], ids=str)
def test_logits_far_from_zero(backend, dtype, low, high):
    judge(dictated(uniform(16, 151, low, high), dtype), backend)


@pytest.mark.parametrize("gap", [59.0, 61.0, 88.0, 90.0, 104.0, 300.0, 2000.0])
def test_improbable_targets(backend, dtype, gap):
    """Beyond 88 the exponential of the distance to the target overflows float32."""
    logits = uniform(12, 131, -1, 1)
    p = dictated(logits, dtype)
    logits[torch.arange(12), p.targets] -= gap
    logits[::3] += 2 * gap  # all the same to a softmax
    exact = judge(dictated(logits, dtype), backend)
    assert exact["logp"].max() < -gap


def test_one_improbable_token_among_others(backend, dtype):
    """A rescued row must not disturb its neighbours, nor they it."""
    logits = uniform(20, 131, -4, 4)
    p = dictated(logits, dtype)
    logits[4, p.targets[4]] -= 95.0
    logits[17, p.targets[17]] -= 400.0
    judge(dictated(logits, dtype), backend)


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 100.0, 1000.0])
def test_near_deterministic_tokens(backend, dtype, gap):
    logits = uniform(12, 131, -1, 1)
    p = dictated(logits, dtype)
    logits[torch.arange(12), p.targets] += gap
    judge(dictated(logits, dtype), backend)


def test_equal_logits(backend, dtype):
    p = dictated(torch.zeros(6, 131), dtype)
    exact = judge(p, backend)
    assert torch.allclose(exact["entropy"], torch.tensor(131.0).double().log())


@pytest.mark.parametrize("nothing", [-torch.inf, -1e30, -3e38], ids=str)
def test_forbidden_tokens(backend, nothing):
    """A bias of minus infinity forbids a token: entropy has no 0 * inf, and neither has any gradient."""
    p = make_problem(seed=60)
    bias = p.normal(301)
    forbidden = torch.arange(301) % 3 == 1
    bias[forbidden] = nothing
    p.targets = p.targets.where(~p.kept, p.targets // 3 * 3)
    p.options = {"bias": bias}
    x = leaves(p)
    exact, exact_grads = statistics(reference.token_stats, p, double=True)
    upcast, plain_grads = statistics(reference.token_stats, p, dtype=torch.float32)
    for max_bytes in (None, small_budget(p)):
        got, grads = statistics(rk.token_stats, p, backend=backend, max_bytes=max_bytes)
        for name in got:
            assert_value(name, got[name], exact[name], upcast[name], torch.float32)
        for name in x:
            assert_gradient(name, grads[name], exact_grads[name], plain_grads[name], torch.float32)
        assert not grads["weight"][forbidden].any()
        assert not grads["bias"][forbidden].any()


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_logp_is_true_to_float32(backend, bias):
    """Logit standard deviation 6, hidden 512: peers that round logits to bf16 are off by 0.1."""
    rows, vocab = (32, 301) if os.environ.get("TRITON_INTERPRET") == "1" else (48, 2003)
    size = {"lengths": (rows,), "hidden_size": 512, "vocab": vocab}
    p = make_problem(torch.bfloat16, **size, scale=6.0, seed=61, silent_sequences=0)
    if bias:
        p.options = {"bias": p.normal(vocab).bfloat16()}
    exact = reference.token_stats(p.hidden, p.weight, p.targets, **p.options)
    assert 5.5 < reference.materialised_logits(p.hidden, p.weight).std() < 6.5
    for max_bytes in (None, small_budget(p)):
        weight = p.weight.clone().requires_grad_()
        stats = rk.token_stats(p.hidden, weight, p.targets, **p.options, backend=backend, max_bytes=max_bytes)
        assert (stats.logp.double() - exact.logp).abs().max() < 2e-5
        assert (stats.entropy.double() - exact.entropy).abs().max() < 2e-5
        with torch.no_grad():
            scored = rk.token_stats(p.hidden, weight, p.targets, **p.options, backend=backend, max_bytes=max_bytes)
        assert (scored.logp.double() - exact.logp).abs().max() < 2e-5
        assert (scored.entropy.double() - exact.entropy).abs().max() < 2e-5


def test_gradcheck(backend):
    p = make_problem(torch.float64, lengths=(4, 3), hidden_size=3, vocab=7, seed=62, silent_sequences=0)
    bias = p.normal(7).double().requires_grad_()
    temperature = 0.5 + torch.rand(7, generator=p.generator)
    for max_bytes in (None, small_budget(p) // 3):

        def head(hidden, weight, bias, max_bytes=max_bytes):
            stats = rk.token_stats(
                hidden, weight, p.targets, bias=bias, softcap=3.0, logit_scale=1.2, temperature=temperature,
                backend=backend, max_bytes=max_bytes,
            )  # fmt: skip
            return stats.logp, stats.entropy, stats.lse

        assert torch.autograd.gradcheck(head, (p.hidden.requires_grad_(), p.weight.requires_grad_(), bias))


def test_gradcheck_of_a_loss(backend):
    p = make_problem(torch.float64, lengths=(3, 2, 2, 3), hidden_size=3, vocab=7, seed=63, silent_sequences=0)
    ref = p.normal(p.targets.numel()).double() - 2

    def loss(hidden, weight):
        return rk.dpo_loss(hidden, weight, p.targets, p.cu_seqlens, ref, label_smoothing=0.1, backend=backend).loss

    assert torch.autograd.gradcheck(loss, (p.hidden.requires_grad_(), p.weight.requires_grad_()))


@pytest.mark.parametrize("tight", [False, True])
def test_the_same_bits_twice(backend, dtype, tight):
    p = make_problem(dtype, lengths=(40, 37), hidden_size=33, vocab=1009, seed=64, silent_sequences=0)
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    advantages, old = p.normal(77), p.normal(77) - 7

    def both() -> list[Tensor]:
        stats, grads = statistics(rk.token_stats, p, **kwargs)
        x = leaves(p)
        out = rk.ppo_loss(x["hidden"], x["weight"], p.targets, old, advantages, entropy_coef=0.1, **kwargs)
        out.loss.backward()
        return [*stats.values(), *grads.values(), out.loss.detach(), *(v.grad for v in x.values())]

    for a, b in zip(both(), both(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 3])
def test_csrc_sums_in_one_order_on_any_number_of_threads(threads):
    """Of ready logits, so that no product of torch's, which may round otherwise, comes in between."""
    if rk.backends()["native"] != "ok":
        pytest.skip("the extension was not built")
    z, targets, found = 5 * torch.randn(301, 5003), torch.arange(301) * 7, []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            x = z.clone().requires_grad_()
            stats = rk.token_stats_from_logits(x, targets, backend="native")
            (stats.logp.sum() + 0.3 * stats.entropy.sum() - 0.1 * stats.lse.sum()).backward()
            found.append((stats.logp, stats.entropy, stats.lse, stats.mean_logit, x.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_statistics_of_a_row_do_not_depend_on_its_company(backend):
    """A token scored alone, in a batch and in small pieces has the same logp to a few ulps."""
    p = make_problem(seed=65)
    batch = rk.token_stats(p.hidden, p.weight, p.targets, backend=backend).logp
    for i in p.kept.nonzero().flatten().tolist()[::5]:
        alone = rk.token_stats(p.hidden[i : i + 1], p.weight, p.targets[i : i + 1], backend=backend).logp
        assert abs(alone[0] - batch[i]) <= 2e-6 * max(1.0, abs(batch[i].item()))


def test_inputs_are_left_alone(backend, dtype):
    p = make_problem(dtype, seed=66)
    before = p.hidden.clone(), p.weight.clone(), p.targets.clone()
    statistics(rk.token_stats, p, backend=backend)
    for a, b in zip(before, (p.hidden, p.weight, p.targets), strict=True):
        assert torch.equal(a, b)


def test_logits_are_left_alone(backend):
    logits = torch.randn(5, 11)
    before = logits.clone()
    z = logits.requires_grad_()
    rk.token_stats_from_logits(z, torch.arange(5), temperature=0.5, backend=backend).logp.sum().backward()
    assert torch.equal(z.detach(), before)
