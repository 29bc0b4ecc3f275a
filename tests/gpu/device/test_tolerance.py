"""What is left out on a GPU: within its bound, the same bits twice, and rows without a gradient in no product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.engine import span

cuda = torch.device("cuda")


def problem(dtype: torch.dtype, n: int = 400, size: int = 96, vocab: int = 40_000) -> tuple[Tensor, ...]:
    """Most rows are sure of their target, every fifth is not."""
    rng = torch.Generator(cuda).manual_seed(0)
    weight = torch.randn(vocab, size, generator=rng, device=cuda) * size**-0.5
    targets = torch.randint(vocab, (n,), generator=rng, device=cuda)
    lift = 18.0 * (1 + torch.rand(n, 1, generator=rng, device=cuda))
    lift[::5] *= 0.5
    hidden = 2.0 * torch.randn(n, size, generator=rng, device=cuda) + lift * weight[targets]
    advantages = torch.randn(n, generator=rng, device=cuda)
    return hidden.to(dtype), weight.to(dtype), targets, advantages


def gradients(given: tuple[Tensor, ...], **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    hidden, weight, targets, advantages = given
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = rk.ppo_loss(x, w, targets, None, advantages, **options)
    out.loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    return x.grad.double(), w.grad.double(), out.metrics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_bytes", [None, 20_000_000])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_within_its_bound(dtype, max_bytes, entropy_coef):
    given, options = problem(dtype), {"max_bytes": max_bytes, "entropy_coef": entropy_coef}
    exact_x, exact_w, _ = gradients(given, **options)
    x, w, metrics = gradients(given, tolerance=2e-3, **options)
    assert 0 < metrics["tolerance/lost"] <= 2e-3
    assert 0 < metrics["tolerance/dense"] < 0.6
    rounding = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    gradient = exact_x.norm() / torch.linalg.matrix_norm(given[1].double(), 2)  # of the logits, at least
    assert (x - exact_x).norm() <= rounding * exact_x.norm() + 2e-3 * 30 * gradient
    assert (w - exact_w).norm() <= rounding * exact_w.norm() + 2e-2 * exact_w.norm()
    assert (x == 0).all(1).sum() > 100, "rows that hardly matter keep nothing"
    again = gradients(given, tolerance=2e-3, **options)
    assert torch.equal(x, again[0])
    assert torch.equal(w, again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_rows_without_a_gradient_leave_the_products(monkeypatch, dtype, entropy_coef):
    """Rows move together in place: against the way on which all of them stay where they are."""
    hidden, weight, targets, advantages = problem(dtype)
    advantages = torch.where(torch.rand(len(targets), device=cuda) < 0.5, 0.0, advantages)
    given, found = (hidden, weight, targets, advantages), []
    for worth in (float("inf"), 0.0):
        monkeypatch.setattr(span, "WORTH_A_WAIT", worth)
        found.append(gradients(given, entropy_coef=entropy_coef))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert (a - b).norm() <= {torch.bfloat16: 6e-3, torch.float32: 1e-5}[dtype] * a.norm()
