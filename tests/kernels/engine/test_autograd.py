"""Everything autograd may ask of the engine, on both ways through it, with its stash and without."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import Problem, leaves, make_problem, small_budget


def token_nll(stats, cu_seqlens):
    return -stats.logp.sum(), {}


def nll(x, p: Problem, **kwargs) -> torch.Tensor:
    return rk.fused_loss(x["hidden"], x["weight"], p.targets, token_nll, **kwargs).loss


def stats_nll(x, p: Problem, **kwargs) -> torch.Tensor:
    stats = rk.token_stats(x["hidden"], x["weight"], p.targets, **kwargs)
    return (-stats.logp + 0.3 * stats.entropy).sum()


WAYS = pytest.mark.parametrize("way", [nll, stats_nll], ids=["fused_loss", "token_stats"])
BUDGET = pytest.mark.parametrize("tight", [False, True], ids=["stash", "recompute"])


def gradients(x) -> list[torch.Tensor]:
    return [v.grad.clone() for v in x.values()]


def once(way, p, factor=1.0, **kwargs) -> list[torch.Tensor]:
    x = leaves(p)
    (factor * way(x, p, **kwargs)).backward()
    return gradients(x)


def same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@WAYS
@BUDGET
def test_backward_twice(backend, way, tight):
    p = make_problem(seed=15)
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    x = leaves(p)
    loss = way(x, p, **kwargs)
    (2 * loss).backward(retain_graph=True)
    (3 * loss).backward()
    same(gradients(x), once(way, p, 5.0, **kwargs))


@WAYS
@BUDGET
def test_two_losses_before_one_backward(backend, way, tight):
    p, q = make_problem(seed=16), make_problem(seed=17)
    q.weight = p.weight
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    x = leaves(p)
    y = leaves(q) | {"weight": x["weight"]}
    (2 * way(x, p, **kwargs) - way(y, q, **kwargs)).backward()
    first, second = once(way, p, 2.0, **kwargs), once(way, q, -1.0, **kwargs)
    same(gradients(x), [first[0], first[1] + second[1]])
    same([y["hidden"].grad], [second[0]])


@WAYS
def test_no_grad(backend, way):
    p = make_problem()
    x = leaves(p)
    with torch.no_grad():
        quiet = way(x, p, backend=backend)
    assert not quiet.requires_grad
    loud = way(x, p, backend=backend)
    assert loud.requires_grad
    assert abs(quiet - loud) <= 1e-6 * abs(loud)


@WAYS
def test_zero_from_above_gives_zero(backend, way):
    """As for a loss with weight zero; it must not divide by what came from above."""
    for grad in once(way, make_problem(), 0.0, backend=backend):
        assert not grad.any()


@WAYS
@BUDGET
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, way, tight, reentrant):
    p = make_problem(seed=18)
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    x = leaves(p)

    def step(hidden, weight):
        return way({"hidden": torch.tanh(hidden), "weight": weight}, p, **kwargs)

    checkpoint(step, x["hidden"], x["weight"], use_reentrant=reentrant).backward()
    got = gradients(x)
    x = leaves(p)
    step(x["hidden"], x["weight"]).backward()
    same(got, gradients(x))


@WAYS
def test_tied_embeddings(backend, way):
    """One weight is both embedding and head: its gradient is the sum of both."""
    p = make_problem(seed=19)
    words = torch.randint(301, p.targets.shape, generator=p.generator)
    weight = p.weight.clone().requires_grad_()
    way({"hidden": torch.tanh(F.embedding(words, weight)), "weight": weight}, p, backend=backend).backward()

    double = p.weight.double().requires_grad_()
    exact = reference.token_stats(torch.tanh(F.embedding(words, double)), double, p.targets)
    total = -exact.logp.sum() + (0.3 * exact.entropy.sum() if way is stats_nll else 0)
    total.backward()
    assert (weight.grad - double.grad).norm() <= 2e-6 * double.grad.norm()


@WAYS
@BUDGET
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_head_or_body(backend, way, tight, frozen):
    p = make_problem(seed=20)
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    both = dict(zip(("hidden", "weight"), once(way, p, **kwargs), strict=True))
    x = leaves(p)
    x[frozen].requires_grad_(False)
    way(x, p, **kwargs).backward()
    assert x[frozen].grad is None
    other = {"hidden": "weight", "weight": "hidden"}[frozen]
    same([x[other].grad], [both[other]])


@WAYS
def test_non_contiguous_inputs(backend, way):
    p = make_problem(seed=21)
    x = {k: v.detach().T.contiguous().T.requires_grad_() for k, v in leaves(p).items()}
    assert not x["hidden"].is_contiguous()
    way(x, p, backend=backend).backward()
    same(gradients(x), once(way, p, backend=backend))
    wide = torch.cat([p.hidden, p.hidden + 1], 1)[:, :24]
    strided = p.targets.repeat_interleave(2)[::2]
    assert torch.equal(
        rk.token_stats(wide, p.weight, strided, backend=backend).logp,
        rk.token_stats(p.hidden, p.weight, p.targets, backend=backend).logp,
    )


def test_non_contiguous_gradient_from_above(backend):
    p = make_problem(seed=21)
    x = leaves(p)
    stats = rk.token_stats(x["hidden"], x["weight"], p.targets, backend=backend)
    upstream = torch.randn(p.targets.numel(), 3, generator=p.generator)
    torch.autograd.backward([stats.logp, stats.entropy], [upstream[:, 1], upstream[:1, 2].expand(len(upstream))])
    got = gradients(x)
    x = leaves(p)
    stats = rk.token_stats(x["hidden"], x["weight"], p.targets, backend=backend)
    (stats.logp * upstream[:, 1] + stats.entropy * upstream[0, 2]).sum().backward()
    same(got, gradients(x))


@WAYS
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no-sequences", "empty-sequences"])
def test_zero_rows(backend, way, lengths):
    p = make_problem(lengths=lengths, silent_sequences=0)
    x = leaves(p)
    loss = way(x, p, backend=backend)
    assert loss == 0
    loss.backward()
    assert not x["weight"].grad.any()
    assert x["hidden"].grad.shape == (0, 24)


@WAYS
def test_all_rows_ignored_gives_zero_and_zero_gradient(backend, way):
    p = make_problem(silent_sequences=8)
    for grad in once(way, p, backend=backend):
        assert not grad.any()


@WAYS
def test_ignored_hidden_states_never_meet_the_head(backend, way):
    p = make_problem(seed=22)
    expected = once(way, p, backend=backend)
    p.hidden[~p.kept] = torch.nan
    got = once(way, p, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@WAYS
@BUDGET
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(backend, way, tight, half):
    """The head is cast like any linear layer; statistics stay float32, and gradients come home in float32."""
    p = make_problem(seed=23)
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    x = leaves(p)
    with torch.autocast("cpu", dtype=half):
        loss = way(x, p, **kwargs)
        assert loss.dtype == torch.float32
    loss.backward()
    q = make_problem(seed=23)
    q.hidden, q.weight = q.hidden.to(half), q.weight.to(half)
    for a, b in zip(gradients(x), once(way, q, **kwargs), strict=True):
        assert a.dtype == torch.float32
        assert (a - b.float()).norm() <= torch.finfo(half).eps * b.float().norm()


@WAYS
@BUDGET
def test_second_derivatives_are_refused(backend, way, tight):
    """A gradient with a graph may be made; whoever differentiates it hears that it cannot be done, whatever for."""
    p = make_problem(seed=24)
    kwargs = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    x = leaves(p)
    inputs = list(x.values())
    grads = torch.autograd.grad(way(x, p, **kwargs), inputs, create_graph=True)
    same([g.detach() for g in grads], once(way, p, **kwargs))
    asks = (lambda penalty: penalty.backward(), lambda penalty: torch.autograd.grad(penalty, inputs[0]))
    for ask in asks:
        with pytest.raises(RuntimeError, match="first derivatives only"):
            ask(sum(g.square().sum() for g in grads))


@WAYS
def test_second_derivatives_through_the_upstream_gradient_are_refused(backend, way):
    """It is the one road to the second derivative that torch's own ``once_differentiable`` closes."""
    p = make_problem(seed=25)
    x, scale = leaves(p), torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(scale * way(x, p, backend=backend), x["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@WAYS
def test_forward_mode_is_refused(way):
    p = make_problem(seed=26)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        way({"hidden": forward_ad.make_dual(p.hidden, torch.ones_like(p.hidden)), "weight": p.weight}, p)


@WAYS
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_transforms_of_functions_are_refused(way, transform):
    p = make_problem(seed=27)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return way({"hidden": hidden, "weight": p.weight}, p)

    asked = {
        "grad": lambda: torch.func.grad(loss)(p.hidden),
        "vmap": lambda: torch.vmap(loss)(p.hidden[None]),
        "jvp": lambda: torch.func.jvp(loss, (p.hidden,), (p.hidden,)),
        "jacrev": lambda: torch.func.jacrev(loss)(p.hidden),
    }
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        asked[transform]()


@pytest.mark.parametrize("way", ["statistics", "loss"])
def test_several_upstream_gradients_at_once_are_refused(backend, way):
    hidden, weight, targets = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.arange(3)
    if way == "loss":
        found, upstream = rk.sft_loss(hidden, weight, targets, backend=backend).loss, torch.ones(2)
    else:
        found, upstream = rk.token_stats(hidden, weight, targets, backend=backend).logp, torch.eye(3)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(found, hidden, upstream, is_grads_batched=True)


def test_losses_without_a_head_may_be_transformed():
    """They are plain torch, and so are their derivatives of any order."""
    values, returns = torch.randn(3, 4), torch.randn(4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return rk.value_loss(x, returns).loss

    each = torch.stack([rk.value_loss(v, returns).loss for v in values])
    assert torch.allclose(torch.vmap(loss)(values), each)
    assert torch.allclose(torch.func.grad(loss)(values[0]), (values[0] - returns) / 4)
    assert torch.allclose(torch.func.hessian(loss)(values[0]), torch.eye(4) / 4)
    cu = torch.tensor([0, 4])
    for fn, args in (
        (lambda r, v: rk.gae(r, v, cu), (values, values)),
        (lambda s, a, b: rk.shaped_rewards(s, a, b, cu, beta=0.1), (values[:, :1], values, values)),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.vmap(fn)(*args)
