"""Every statistic of the head against the oracle, values and gradients, on every backend."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import Problem, assert_gradient, assert_value, leaves, make_problem, small_budget

STATISTICS = ("logp", "entropy", "lse", "mean_logit", "top1")
SHAPES = [
    pytest.param((1,), 16, 128, id="one-token"),
    pytest.param((5, 1, 0, 13, 18), 23, 301, id="nothing-divides-anything"),
    pytest.param((32, 32), 32, 256, id="tile-aligned"),
    pytest.param((9, 4), 8, 1, id="one-word"),
    pytest.param((9, 4), 1, 7, id="hidden-of-one"),
]


def cotangents(p: Problem, live: tuple[str, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.targets.shape, generator=generator, dtype=torch.float64) for name in live}


def backward(stats, x, weights) -> dict[str, torch.Tensor]:
    total = sum((c.to(getattr(stats, n).dtype) * getattr(stats, n)).sum() for n, c in weights.items())
    torch.as_tensor(total).backward()
    return {k: v.grad for k, v in x.items()}


def stats_of(fn, p: Problem, weights, double=False, **kwargs):
    x = leaves(p, torch.float64 if double else None)
    options = p.options | {k: v for k, v in x.items() if k == "bias"}
    stats = fn(x["hidden"], x["weight"], p.targets, **options, **kwargs)
    return stats, backward(stats, x, weights)


def check_stats(p: Problem, backend: str, live: tuple[str, ...] = ("logp", "entropy", "lse")) -> None:
    dtype, weights = p.hidden.dtype, cotangents(p, live)
    exact, exact_grads = stats_of(reference.token_stats, p, weights, double=True)
    upcast, _ = stats_of(reference.token_stats, p, weights, dtype=torch.promote_types(dtype, torch.float32))
    _, plain_grads = stats_of(reference.token_stats, p, weights, dtype=dtype)
    for max_bytes in (None, small_budget(p)):
        stats, grads = stats_of(rk.token_stats, p, weights, backend=backend, max_bytes=max_bytes)
        for name in ("logp", "entropy", "lse"):
            assert_value(name, getattr(stats, name), getattr(exact, name), getattr(upcast, name), dtype)
        if stats.mean_logit is not None:
            assert_value("mean_logit", stats.mean_logit, exact.mean_logit, upcast.mean_logit, dtype)
        if stats.top1 is not None:
            assert_value("top1", stats.top1, exact.top1, upcast.top1, dtype)
        for name, grad in grads.items():
            assert_gradient(f"gradient of {name}", grad, exact_grads[name], plain_grads[name], dtype)
        assert not grads["hidden"][~p.kept].any()


@pytest.mark.parametrize(("lengths", "hidden_size", "vocab"), SHAPES)
def test_shapes(backend, dtype, lengths, hidden_size, vocab):
    check_stats(make_problem(dtype, lengths=lengths, hidden_size=hidden_size, vocab=vocab, silent_sequences=0), backend)


@pytest.mark.parametrize(
    "live", [("logp",), ("entropy",), ("lse",), ("logp", "lse"), ("logp", "entropy")], ids="+".join
)
def test_each_gradient_alone(backend, dtype, live):
    check_stats(make_problem(dtype, seed=2), backend, live)


def options(p: Problem) -> dict[str, dict]:
    bias = p.normal(p.weight.shape[0]).to(p.weight.dtype)
    each = 0.5 + torch.rand(p.targets.shape, generator=p.generator)
    return {
        "temperature": {"temperature": 0.7},
        "temperature-per-token": {"temperature": p.per_token(each)},
        "bias": {"bias": bias},
        "softcap": {"softcap": 3.0},
        "scale": {"logit_scale": 0.25},
        "everything": {"bias": bias, "softcap": 4.0, "logit_scale": 1.5, "temperature": each, "vocab_size": 290},
    }


@pytest.mark.parametrize("name", list(options(make_problem())))
def test_head_options(backend, dtype, name):
    p = make_problem(dtype, seed=3, vocab_size=290) if name == "everything" else make_problem(dtype, seed=3)
    p.options = options(p)[name]
    check_stats(p, backend)


def test_float64(backend):
    p = make_problem(torch.float64, seed=4)
    p.options = options(p)["everything"]
    p.targets = p.targets.clamp(max=289)
    check_stats(p, backend)


def test_padded_vocabulary_does_not_exist(backend):
    """Padded columns hold rubbish: no statistic and no gradient may know."""
    p = make_problem(vocab=301, vocab_size=289)
    p.weight[289:] = torch.nan
    x = leaves(p)
    stats = rk.token_stats(x["hidden"], x["weight"], p.targets, vocab_size=289, backend=backend)
    (stats.logp.sum() + stats.entropy.sum()).backward()
    exact = reference.token_stats(p.hidden, p.weight[:289], p.targets)
    upcast = reference.token_stats(p.hidden, p.weight[:289], p.targets, dtype=torch.float32)
    assert_value("logp", stats.logp.detach(), exact.logp, upcast.logp, torch.float32)
    assert x["weight"].grad[:289].isfinite().all()
    assert not x["weight"].grad[289:].any()
    assert x["hidden"].grad.isfinite().all()


def test_leading_dimensions(backend):
    p = make_problem(lengths=(12, 12), silent_sequences=0)
    flat = rk.token_stats(p.hidden, p.weight, p.targets, backend=backend)
    folded = rk.token_stats(p.hidden.view(2, 12, -1), p.weight, p.targets.view(2, 12), backend=backend)
    for name in ("logp", "entropy", "lse"):
        assert getattr(folded, name).shape == (2, 12)
        assert torch.equal(getattr(folded, name).flatten(), getattr(flat, name))


def test_another_ignore_index(backend):
    p = make_problem()
    theirs = p.targets.where(p.kept, -1)
    ours = rk.token_stats(p.hidden, p.weight, theirs, ignore_index=-1, backend=backend)
    assert torch.equal(ours.logp, rk.token_stats(p.hidden, p.weight, p.targets, backend=backend).logp)


def test_ignore_index_inside_the_vocabulary(backend):
    """Padding with token 0 is common; then token 0 is never a target, and rows with it are silent."""
    p = make_problem()
    targets = p.targets.where(p.kept, 0)
    stats = rk.token_stats(p.hidden, p.weight, targets, ignore_index=0, backend=backend)
    assert not stats.logp[targets == 0].any()
    assert (stats.logp[targets != 0] < 0).all()


def test_ignored_tokens_are_exactly_silent(backend):
    p = make_problem(silent_sequences=len((5, 1, 0, 13, 7, 9, 4, 8)))
    stats, grads = stats_of(rk.token_stats, p, cotangents(p, ("logp", "entropy", "lse")), backend=backend)
    assert not any(getattr(stats, name).any() for name in ("logp", "entropy", "lse"))
    assert not grads["hidden"].any()
    assert not grads["weight"].any()


def test_from_logits(backend, dtype):
    p = make_problem(dtype, seed=5)
    logits = reference.materialised_logits(p.hidden, p.weight, dtype=torch.float32).to(dtype)
    stats, grads = {}, {}
    weights = cotangents(p, ("logp", "entropy", "lse"))
    eye = torch.eye(logits.shape[1], dtype=torch.float64)
    for name, precision in (("exact", torch.float64), ("upcast", torch.float32), ("ours", dtype)):
        z = logits.detach().to(precision, copy=True).requires_grad_()
        if name == "ours":
            out = rk.token_stats_from_logits(z, p.targets, temperature=0.8, backend=backend)
        else:
            out = reference.token_stats(z, eye, p.targets, temperature=0.8, dtype=precision)
        stats[name], grads[name] = out, backward(out, {"logits": z}, weights)["logits"]
    for name in ("logp", "entropy", "lse"):
        mine, exact, upcast = (getattr(stats[k], name) for k in ("ours", "exact", "upcast"))
        assert_value(name, mine.detach(), exact.detach(), upcast.detach(), dtype)
    rounded = grads["exact"].to(dtype)  # the best that a gradient in this dtype can be
    plain = rounded if dtype != torch.float32 else grads["upcast"]
    assert_gradient("gradient of logits", grads["ours"], grads["exact"], plain, dtype)


def test_token_logps(backend, dtype):
    p = make_problem(dtype, seed=6)
    ids = torch.randint(301, (p.targets.numel(), 5), generator=p.generator)
    ids[:, 3] = ids[:, 1]  # asked for twice: gradients add up
    ids[~p.kept] = -100
    ids[::3, 2] = -100  # some of a position's ids only
    weights = torch.randn(ids.shape, generator=p.generator, dtype=torch.float64)

    def one(fn, double=False, **kwargs):
        x = leaves(p, torch.float64 if double else None)
        logps = fn(x["hidden"], x["weight"], ids, temperature=0.9, **kwargs)
        (logps * weights.to(logps.dtype)).sum().backward()
        return logps.detach(), x["hidden"].grad, x["weight"].grad

    exact, upcast = one(reference.token_logps, True), one(reference.token_logps, dtype=torch.float32)
    plain = one(reference.token_logps, dtype=dtype)
    for max_bytes in (None, small_budget(p)):
        got = one(rk.token_logps, backend=backend, max_bytes=max_bytes)
        assert_value("logps", got[0], exact[0], upcast[0], dtype)
        assert_gradient("gradient of hidden", got[1], exact[1], plain[1], dtype)
        assert_gradient("gradient of weight", got[2], exact[2], plain[2], dtype)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("ref_hidden_size", [24, 11])
def test_kl_divergence(backend, dtype, direction, ref_hidden_size):
    p = make_problem(dtype, seed=7)
    ref = make_problem(dtype, seed=8, hidden_size=ref_hidden_size)
    weights = torch.randn(p.targets.shape, generator=p.generator, dtype=torch.float64)

    def one(fn, double=False, **kwargs):
        x = leaves(p, torch.float64 if double else None)
        kl = fn(
            x["hidden"], x["weight"], ref.hidden, ref.weight, p.targets, direction=direction, temperature=1.3, **kwargs
        )
        (kl * weights.to(kl.dtype)).sum().backward()
        return kl.detach(), x["hidden"].grad, x["weight"].grad

    exact, upcast = one(reference.kl_divergence, True), one(reference.kl_divergence, dtype=torch.float32)
    plain = one(reference.kl_divergence, dtype=dtype)
    for max_bytes in (None, small_budget(p)):
        got = one(rk.kl_divergence, backend=backend, max_bytes=max_bytes)
        assert_value("kl", got[0], exact[0], upcast[0], dtype)
        assert_gradient("gradient of hidden", got[1], exact[1], plain[1], dtype)
        assert_gradient("gradient of weight", got[2], exact[2], plain[2], dtype)


def test_kl_of_a_policy_to_itself_is_zero(backend):
    p = make_problem()
    kl = rk.kl_divergence(p.hidden, p.weight, p.hidden, p.weight, p.targets, backend=backend)
    assert kl.abs().max() <= 8 * torch.finfo(torch.float32).eps * 10  # of lse, which is below ten
    assert not kl[~p.kept].any()
