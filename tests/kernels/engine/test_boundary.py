"""Autocast ends at the front door: inside of it every number is that of the same inputs cast by hand, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from tests.contracts.test_every_loss import every_loss
from tests.support.problems import PAIRS, Problem, make_problem, small_budget

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def problem() -> Problem:
    """Products of this size are cast by a careless autocast, and their rounding shows in every statistic."""
    return make_problem(seed=71, lengths=PAIRS, silent_sequences=2, hidden_size=48)


def statistic(fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    def run(hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        found = fn(hidden, weight, **options)
        found = found._asdict() if isinstance(found, tuple) else {"value": found}
        found = {name: x for name, x in found.items() if x is not None}
        differentiable = [x for x in found.values() if x.requires_grad]
        mix = torch.stack([(x * (i + 1)).sum() for i, x in enumerate(differentiable)]).sum()
        return mix, {name: x.detach() for name, x in found.items()}

    return run


def calls(p: Problem) -> dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
    ids = torch.stack([p.targets, p.targets.roll(1)], 1)
    ref_hidden, ref_weight = p.hidden.roll(1, 0), p.weight.roll(1, 0)

    def kl(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        ref = ref_hidden.to(hidden.dtype), ref_weight.to(hidden.dtype)
        head = {"bias": torch.linspace(-1, 1, weight.shape[0]).to(hidden.dtype)}
        return rk.kl_divergence(hidden, weight, *ref, p.targets, ref_head=head, **options)

    def loss(name: str) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        fn, _, args = every_loss(p)[name]
        return lambda hidden, weight, **options: fn(hidden, weight, p.targets, *args, **options)

    return {
        "token_stats": statistic(lambda h, w, **o: rk.token_stats(h, w, p.targets, **o)),
        "token_logps": statistic(lambda h, w, **o: rk.token_logps(h, w, ids, **o)),
        "kl_divergence": statistic(kl),
        **{name: loss(name) for name in every_loss(p)},
    }


def gradients(call: Any, p: Problem, dtype: torch.dtype, forward: Any, backward: Any, **options: Any) -> list[Tensor]:
    """Value, metrics and gradients; leaves are float32, and ``dtype`` is what they are cast to by hand."""
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    with forward:
        value, extra = call(hidden.to(dtype), weight.to(dtype), **options)
    with backward:
        value.backward()
    return [value.detach(), *extra.values(), hidden.grad, weight.grad]


@HALVES
@pytest.mark.parametrize("tight", [False, True], ids=["stash", "recompute"])
@pytest.mark.parametrize("name", list(calls(problem())))
def test_inside_as_outside(backend, name, tight, half):
    p = problem()
    call = calls(p)[name]
    options = {"backend": backend, "max_bytes": small_budget(p) if tight else None}
    by_hand = gradients(call, p, half, nullcontext(), nullcontext(), **options)
    for backward in (nullcontext(), torch.autocast("cpu", half)):
        inside = gradients(call, p, torch.float32, torch.autocast("cpu", half), backward, **options)
        for ours, expected in zip(inside, by_hand, strict=True):
            assert torch.equal(ours, expected)


@HALVES
def test_float64_stays_float64(backend, half):
    """``F.linear`` casts no float64, and neither does the head."""
    if backend.startswith("triton"):
        pytest.skip("computes no float64")
    p = make_problem(torch.float64)
    with torch.autocast("cpu", half):
        inside = rk.token_stats(p.hidden, p.weight, p.targets, backend=backend).logp
    assert torch.equal(inside, rk.token_stats(p.hidden, p.weight, p.targets, backend=backend).logp)


@HALVES
def test_ready_logits_are_left_as_they_are(backend, half):
    """They meet no product, so they keep their digits, as they would in ``cross_entropy``."""
    p = problem()
    logits, bias = p.hidden @ p.weight.T, torch.linspace(-1, 1, p.weight.shape[0])

    def once() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        stats = rk.token_stats_from_logits(leaf, p.targets, bias=bias, backend=backend)
        stats.logp.sum().backward()
        return [stats.logp.detach(), stats.entropy.detach(), leaf.grad]

    outside = once()
    with torch.autocast("cpu", half):
        inside = once()
    assert all(map(torch.equal, inside, outside))


def test_the_callers_objective_keeps_its_digits_too(backend):
    """It runs in the middle of the pass, where autocast is off: a product of statistics is one of float32."""
    p = problem()
    square = torch.randn(p.targets.numel(), p.targets.numel(), generator=p.generator)

    def objective(stats, cu_seqlens):
        n = stats.logp.numel()
        return (square[:n, :n] @ stats.logp).sum(), {}

    hidden, weight = p.hidden.bfloat16(), p.weight.bfloat16()
    outside = rk.fused_loss(hidden, weight, p.targets, objective, backend=backend).loss
    with torch.autocast("cpu", torch.bfloat16):
        inside = rk.fused_loss(p.hidden, p.weight, p.targets, objective, backend=backend).loss
    assert torch.equal(inside, outside)


@HALVES
def test_losses_without_a_head(half):
    x = torch.randn(12, generator=torch.Generator().manual_seed(5))
    cu = torch.tensor([0, 5, 12])
    scores, mask = x.cumsum(0), x > -1

    def all_of_them() -> list[Tensor]:
        values = x.clone().requires_grad_()
        loss = rk.value_loss(values, x.roll(1), old_values=x.roll(2), clip=0.2, mask=mask).loss
        loss = loss + rk.bradley_terry_loss(values).loss + rk.infonce_loss(values, mask, 3).loss
        loss = loss + rk.plackett_luce_loss(values, x.argsort(), 4).loss
        loss.backward()
        shaped, kl = rk.shaped_rewards(scores[:2], x, x.roll(1), cu, beta=0.1)
        return [
            loss.detach(), values.grad, shaped, kl, *rk.gae(shaped, x, cu, whiten=True),
            rk.whiten(x, mask), rk.group_advantages(scores, 4),
        ]  # fmt: skip

    outside = all_of_them()
    with torch.autocast("cpu", half):
        inside = all_of_them()
    assert all(map(torch.equal, inside, outside))
