"""``tolerance``: what may be left out of the gradient is bounded, and the bound is never broken."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.backends import sparse
from tests.support.problems import PAIRS, check, make_problem, ref_logp, rollout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a program at a time, so that a few cases must do
V = 640  # columns of an identity head: the gradient of its hidden states is that of the logits


def gradients(z: Tensor, targets: Tensor, upstream: dict[str, Tensor], **options) -> Tensor:
    """[n, V] gradient of the logits, through an identity head."""
    x = z.clone().requires_grad_()
    stats = rk.token_stats(x, torch.eye(z.shape[1], dtype=z.dtype), targets, **options)
    torch.stack([(getattr(stats, name) * g).sum() for name, g in upstream.items()]).sum().backward()
    assert x.grad is not None
    return x.grad.double()


def true_gradients(z: Tensor, targets: Tensor, upstream: dict[str, Tensor]) -> Tensor:
    x = z.double().requires_grad_()
    stats = reference.token_stats(x, torch.eye(z.shape[1], dtype=torch.float64), targets)
    torch.stack([(getattr(stats, name) * g.double()).sum() for name, g in upstream.items()]).sum().backward()
    assert x.grad is not None
    return x.grad


def drawn(kind: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of logits that make it hard: [n, V] and [n] targets."""
    rng = torch.Generator().manual_seed(seed)
    z, targets = torch.randn(n, V, generator=rng), torch.randint(V, (n,), generator=rng)
    if kind == "peaked":
        z[torch.arange(n), torch.randint(V, (n,), generator=rng)] += 12 * torch.rand(n, generator=rng)
    elif kind == "certain":
        z[torch.arange(n), targets] += 20 + 20 * torch.rand(n, generator=rng)
    elif kind == "flat":
        z = torch.zeros(n, V)
    elif kind == "steep":
        z *= 8
    elif kind == "steps":  # masses spread evenly below one another, each just under what was allowed before it
        z = -torch.arange(V).div(V // 12, rounding_mode="floor").float().expand(n, V) * 2.3
        z = z[:, torch.randperm(V, generator=rng)].contiguous()
    elif kind == "far":
        z = z * 3 + 2000
    return z, targets


KINDS = ("plain", "peaked", "certain", "flat", "steep", "steps", "far")


def cases(*all_of_them, interpreted):
    return interpreted if INTERPRETED else list(all_of_them)


@pytest.fixture
def backend(backend, request):
    """Which way the forward went makes no difference to what is left out."""
    if INTERPRETED and "fused" in request.node.name:
        pytest.skip("the other way does")
    return backend


def assert_bound(found: Tensor, exact: Tensor, tolerance: float, rounding: float, noise: Tensor | float = 0.0) -> None:
    """Row by row: what is missing, relative to the root mean square row. ``noise``: that of p - 1 near certainty."""
    lost, norm = (found - exact).norm(dim=1), exact.norm(dim=1)
    typical = norm[norm > 0].square().mean().sqrt()
    worst = ((lost - rounding * norm - noise) / typical.clamp(min=1e-300)).max()
    assert worst <= tolerance, f"{worst:.2e} of a row is missing, {tolerance} was allowed"


@pytest.mark.parametrize("kind", cases(*KINDS, interpreted=["peaked", "steps"]))
@pytest.mark.parametrize("tolerance", cases(1e-3, 2e-2, 0.3, interpreted=[0.3]))
@pytest.mark.parametrize("dtype", cases(torch.float32, torch.bfloat16, torch.float16, interpreted=[torch.bfloat16]))
def test_no_row_loses_more_than_allowed(backend, kind, tolerance, dtype):
    z, targets = drawn(kind, 40, seed=1)
    z = z.to(dtype)
    upstream = {"logp": torch.linspace(-2, 2, 40)}
    exact = true_gradients(z, targets, upstream)
    dense = gradients(z, targets, upstream, backend=backend)
    found = gradients(z, targets, upstream, backend=backend, tolerance=tolerance)
    rounding = ((dense - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-300))[exact.norm(dim=1) > 0].max().item()
    assert_bound(found, exact, tolerance, 2 * rounding)
    if tolerance == 0.3 and kind not in ("flat", "plain"):  # these keep everything
        assert (found == 0).float().mean() > 0.1, "nothing was left out: the test proves nothing"


LOUD = torch.tensor([1e3, 1.0, 1e-3, 1e-6, 0.0, -1.0])  # rows that matter, and rows that hardly do


@pytest.mark.parametrize("what", ["several ids", "entropy", "reverse", "forward"])
@pytest.mark.parametrize("softcap", cases(None, 12.0, interpreted=[12.0]))
@pytest.mark.parametrize("tolerance", cases(1e-3, 0.1, interpreted=[0.1]))
def test_the_bound_holds_for_all_that_a_head_can_have(backend, what, softcap, tolerance):
    """Exact KL, entropy, several ids, softcap, scale, bias and temperatures, in rows of very different size."""
    z, targets = drawn("peaked", 24, seed=9)
    rng = torch.Generator().manual_seed(2)
    bias, ref = torch.randn(V, generator=rng), z + torch.randn(z.shape, generator=rng)
    weights = torch.randn(24, 3, generator=rng) * LOUD.repeat(4)[:, None]
    head = {"softcap": softcap, "logit_scale": 3.0, "bias": bias}
    options = {**head, "temperature": 0.5 + torch.rand(24, generator=rng), "backend": backend}
    found = []
    for allowed in (None, tolerance):
        x, eye = z.clone().requires_grad_(), torch.eye(V)
        if what == "several ids":
            ids = torch.stack([targets, z.argmax(1), targets.flip(0)], 1)
            statistic = rk.token_logps(x, eye, ids, tolerance=allowed, **options)
        elif what == "entropy":
            statistic = rk.token_stats(x, eye, targets, tolerance=allowed, **options).entropy[:, None]
        else:
            statistic = rk.kl_divergence(
                x, eye, ref, eye, targets, direction=what, ref_head=head, tolerance=allowed, **options
            )[:, None]  # fmt: skip
        found.append(torch.autograd.grad((statistic * weights[:, : statistic.shape[1]]).sum(), x)[0].double())
    dense, some = found
    assert_bound(some, dense, tolerance, 1e-6)
    assert (some == 0).sum() > 1.1 * (dense == 0).sum()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), tolerance=st.floats(1e-4, 0.9),
    size=st.sampled_from([1e-30, 1e-18, 1e-6, 1.0, 1e6, 1e18]),
    name=st.sampled_from(["logp", "entropy", "lse", "mean_logit"]),
)  # fmt: skip
@example(kind="steps", seed=1, tolerance=0.25, size=1e-30, name="mean_logit")
@pytest.mark.parametrize("which", ["native", "eager"])
def test_the_bound_holds_whatever_comes(which, kind, seed, tolerance, size, name):
    if rk.backends()[which] != "ok":
        pytest.skip(rk.backends()[which])
    z, targets = drawn(kind, 6, seed)
    rng = torch.Generator().manual_seed(seed)
    upstream = {"logp": size * torch.randn(6, generator=rng), name: size * torch.randn(6, generator=rng)}
    dense = gradients(z, targets, upstream, backend=which)
    found = gradients(z, targets, upstream, backend=which, tolerance=tolerance)
    assert_bound(found, dense, tolerance, 1e-6, 2.0**-22 * upstream["logp"].abs())
    kept = found != 0
    assert torch.equal(found[kept], dense[kept]), "what is kept is what the exact way computes"


DTYPES = cases(*(torch.float32, torch.bfloat16, torch.float16, torch.float64), interpreted=[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases("ppo", "dpo", interpreted=["ppo"]))
def test_products_of_a_few_entries(backend, name, dtype, monkeypatch):
    """Most columns have no probability at all, so that the few that are left are everything: as exact as ever."""
    monkeypatch.setattr(sparse, "looks_flat", lambda entropy, depth, few: entropy < 0)  # so small a tolerance does
    p = make_problem(dtype, seed=71, lengths=PAIRS, silent_sequences=2, scale=1.0)
    p.targets = p.targets.where(~p.kept, p.targets % 50)
    p.options["bias"] = torch.where(torch.arange(p.weight.shape[0]) < 50, 0.0, -400.0).to(dtype)
    loss, oracle, args = {
        "ppo": (rk.ppo_loss, reference.ppo_loss, rollout(p)),
        "dpo": (rk.dpo_loss, reference.dpo_loss, (p.cu_seqlens, ref_logp(p))),
    }[name]
    check(partial(loss, tolerance=1e-7), oracle, p, *args, backend=backend)
    out = loss(p.hidden.clone().requires_grad_(), p.weight, p.targets, *args, tolerance=1e-7, backend=backend,
               bias=p.options["bias"])  # fmt: skip
    assert out.metrics["tolerance/dense"] == 0


def test_metrics_say_what_was_lost(backend):
    z, targets = drawn("steep", 60, seed=3)
    z[:7] = 0.0  # flat: these keep everything
    found = {}
    for tolerance in (None, 0.01):
        x = z.clone().requires_grad_()
        out = rk.sft_loss(x, torch.eye(V), targets, tolerance=tolerance, backend=backend)
        out.loss.backward()
        assert x.grad is not None
        found[tolerance] = (x.grad.double(), out.metrics)
    (exact, plain), (got, metrics) = found[None], found[0.01]
    assert not [name for name in plain if name.startswith("tolerance")]
    lost = ((got - exact).norm() / exact.norm()).item()
    assert 0 < lost * (1 - 1e-3) <= metrics["tolerance/lost"].item() <= 0.01
    assert metrics["tolerance/dense"].item() == pytest.approx(7 / 60)
    assert torch.equal(got[:7], exact[:7])
    with torch.no_grad():
        quiet = rk.sft_loss(z, torch.eye(V), targets, tolerance=0.01, backend=backend)
    assert quiet.metrics["tolerance/lost"] == quiet.metrics["tolerance/dense"] == 0, "no gradient, nothing lost"


def test_rows_that_hardly_matter_keep_nothing(backend):
    """And are not even looked at: a policy is sure of most of its tokens."""
    z, targets = drawn("certain", 40, seed=4)
    upstream = {"logp": torch.ones(40)}
    z[::4, :] *= 0.1  # unsure
    dense = gradients(z, targets, upstream, backend=backend)
    found = gradients(z, targets, upstream, backend=backend, tolerance=0.01)
    sure = torch.arange(40) % 4 != 0
    assert (found[sure] == 0).all()
    assert dense[sure].any(1).all()
    assert_bound(found, dense, 0.01, 1e-6)
    x = z.clone().requires_grad_()
    metrics = rk.sft_loss(x, torch.eye(V), targets, tolerance=0.01, backend=backend).metrics
    lost = ((found - dense).norm() / dense.norm()).item()
    assert 0 < lost * (1 - 1e-3) <= metrics["tolerance/lost"].item() <= 0.01
    assert metrics["tolerance/dense"] == 10 / 40


def test_flat_rows_go_the_exact_way_bit_by_bit(backend):
    p = make_problem(seed=73, scale=0.01)
    old, advantages = rollout(p)
    found = []
    for tolerance in (None, 1e-4):
        x, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        rk.ppo_loss(x, w, p.targets, old, advantages, tolerance=tolerance, backend=backend).loss.backward()
        found.append((x.grad, w.grad))
    for exact, got in zip(*found, strict=True):
        assert torch.equal(exact, got)


def mixed(p, **options) -> tuple[Tensor, ...]:
    """Gradients of a call in which some rows are sparse and some are not."""
    x, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    x.data[::3] *= 0.01
    out = rk.sft_loss(x, w, p.targets, tolerance=0.01, **options)
    out.loss.backward()
    assert 0.2 < out.metrics["tolerance/dense"] < 0.8
    grads = (options.get("weight_grad", w.grad), x.grad)
    return tuple(g.clone() for g in grads if g is not None)


@pytest.mark.parametrize("dtype", cases(torch.float32, torch.bfloat16, interpreted=[torch.bfloat16]))
def test_sparse_and_dense_rows_meet(backend, dtype):
    """In pieces or at once, into a buffer that is full or has gaps: always the same sums."""
    p = make_problem(dtype, seed=74, scale=6.0, vocab=900, lengths=(40, 40))
    whole = mixed(p, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, mixed(p, backend=backend), strict=True)), "not repeatable"
    slack = 2e-2 if dtype == torch.bfloat16 else 1e-5
    pieces = mixed(p, backend=backend, max_bytes=900 * 8 * 9)
    full = mixed(p, backend=backend, weight_grad=torch.ones(p.weight.shape))
    gaps = mixed(p, backend=backend, weight_grad=torch.ones(*p.weight.shape, 2)[..., 0])
    for other, start in ((pieces, 0.0), (full, 1.0), (gaps, 1.0)):
        for got, want, base in zip(other, whole, (start, 0.0), strict=True):
            assert ((got.float() - base) - want.float()).norm() <= slack * want.float().norm()


def test_the_number_of_threads_changes_nothing():
    p = make_problem(seed=75, scale=6.0, vocab=900, lengths=(40, 40), hidden_size=150)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(mixed(p))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tight", [False, True])
def test_statistics_keep_the_bound_when_they_are_computed_again(backend, tight):
    z, targets = drawn("peaked", 60, seed=5)
    upstream = {"logp": torch.randn(60, generator=torch.Generator().manual_seed(1))}
    upstream["logp"][::4] = 0.0
    options = {"backend": backend, "max_bytes": 700_000 if tight else None}  # a dozen rows at a time
    dense = gradients(z, targets, upstream, **options)
    found = gradients(z, targets, upstream, **options, tolerance=0.02)
    assert (found - dense).norm() <= 0.02 * dense.norm()
    assert (found == 0).sum() > (dense == 0).sum()


def test_inside_a_compiled_step():
    p = make_problem(seed=76, scale=6.0)

    def step(x: Tensor, w: Tensor) -> rk.LossOutput:
        return rk.sft_loss(x, w, p.targets, tolerance=0.05)

    found = []
    for fn in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        loss, metrics = fn(x, w)
        loss.backward()
        found.append((x.grad, w.grad, metrics["tolerance/lost"], metrics["tolerance/dense"]))
    assert found[0][2] > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bad", [0, 1, 1.5, -0.1, float("nan"), "0.1", True])
def test_bad_tolerances(bad):
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises((ValueError, TypeError), match="tolerance"):
        rk.sft_loss(x, w, torch.tensor([0, 1]), tolerance=bad)


def test_where_there_is_nothing_to_save():
    with pytest.raises(ValueError, match=r"tolerance: .*no head"):
        rk.token_stats_from_logits(torch.zeros(2, 4), torch.tensor([0, 1]), tolerance=0.01)
