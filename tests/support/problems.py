"""The tolerance rule, stated once, and the inputs that the tests share.

Statistics and losses may err twice as much as torch on float32-upcast inputs, plus a few float32 ulps of the value's
scale. Gradients may err, in relative L2, twice as much as plain torch in the same dtype (logits in that dtype through
``F.linear``, then ``float().log_softmax``, autograd), plus a few ulps. Both errors are against float64. For float64
inputs the ulps are float64's. Nothing here is typed in by hand but how many ulps "a few" are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import reference

A_FEW = 8  # ulps
UPSTREAM = 1.7  # losses are scaled before backward, so that an upstream gradient that is lost shows

HALF = (torch.bfloat16, torch.float16)


def ulp(dtype: torch.dtype) -> float:
    """Float32's, or float64's for float64: statistics and accumulators are never coarser than float32."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def assert_value(name: str, got: Tensor, exact: Tensor, upcast: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """``scale`` is that of what a value was made from, where it is larger than the value."""
    assert got.dtype == torch.promote_types(dtype, torch.float32), f"{name} is {got.dtype}"
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.isfinite().all(), f"{name} is not finite"
    if not got.numel():
        return
    error, yardstick = ((x.double() - exact).abs().max().item() for x in (got, upcast))
    budget = 2 * yardstick + A_FEW * ulp(dtype) * max(scale, exact.abs().max().item())
    assert error <= budget, f"{name}: error {error:.1e}, budget {budget:.1e} (torch on upcast inputs: {yardstick:.1e})"


def assert_gradient(name: str, got: Tensor | None, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    assert got is not None, f"{name} is None"
    assert got.dtype == plain.dtype, f"{name} is {got.dtype}"
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.isfinite().all(), f"{name} is not finite"
    norm = exact.norm().item()
    error, yardstick = ((x.double() - exact).norm().item() for x in (got, plain))
    budget = 2 * yardstick + A_FEW * ulp(dtype) * norm
    assert error <= budget, (
        f"{name}: relative L2 error {error / max(norm, 1e-300):.1e}, budget {budget / max(norm, 1e-300):.1e}"
    )


@dataclass
class Problem:
    """Packed sequences on their way through a head; some tokens, and one whole sequence or pair, are ignored."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    cu_seqlens: Tensor  # [S + 1]
    generator: torch.Generator
    options: dict[str, Any] = field(default_factory=dict)  # of the head

    @property
    def kept(self) -> Tensor:
        return self.targets != -100

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def per_token(self, x: Tensor) -> Tensor:
        """NaN where ignored: it must not matter."""
        return x.where(self.kept, torch.nan)


RAGGED = (5, 1, 0, 13, 7, 9, 4, 8)  # one empty; the last is ignored altogether
PAIRS = (5, 3, 8, 1, 6, 9, 4, 4)  # the last pair is ignored altogether


def make_problem(
    dtype: torch.dtype = torch.float32,
    *,
    lengths: tuple[int, ...] = RAGGED,
    hidden_size: int = 24,
    vocab: int = 301,
    seed: int = 0,
    scale: float = 2.0,
    silent_sequences: int = 1,
    **options: Any,
) -> Problem:
    """Logits have standard deviation ``scale``; of each longer sequence the first token or two are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    hidden = torch.randn(n, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=generator) * scale / hidden_size**0.5).to(dtype)
    real = options.get("vocab_size") or vocab
    targets = torch.randint(real, (n,), generator=generator)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        targets[start : start + (end - start) // 4] = -100
        if end - start > 6:  # a tool's output in the middle
            targets[start + 4] = -100
    if silent_sequences:
        targets[bounds[-1 - silent_sequences] :] = -100
    return Problem(hidden, weight, targets, cu_seqlens, generator, options)


def true_logp(p: Problem) -> Tensor:
    return reference.token_stats(p.hidden, p.weight, p.targets, **p.options).logp


def rollout(p: Problem) -> tuple[Tensor, Tensor]:
    """Old log-probabilities whose ratios lie on both sides of every clip, and advantages of both signs."""
    old = true_logp(p) + 0.8 * p.normal(p.targets.numel())
    return p.per_token(old.float()), p.per_token(p.normal(p.targets.numel()))


def ref_logp(p: Problem) -> Tensor:
    return p.per_token((true_logp(p) + 0.5 * p.normal(p.targets.numel())).float())


Leaves = dict[str, Any]  # name -> leaf; its grad is a tensor after backward


def leaves(p: Problem, dtype: torch.dtype | None = None) -> Leaves:
    """Fresh leaves for whatever receives a gradient, cast to ``dtype`` if given."""
    found = {"hidden": p.hidden, "weight": p.weight}
    if p.options.get("bias") is not None:
        found["bias"] = p.options["bias"]
    return {k: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for k, x in found.items()}


Result = tuple[Tensor, dict[str, Tensor | None]]


def run(loss: Callable[..., Any], p: Problem, args: tuple, kwargs: dict, double: bool = False) -> Result:
    """The loss and the gradients of all leaves under a gradient from above that is not one."""
    x = leaves(p, torch.float64 if double else None)
    options = {k: v for k, v in p.options.items() if k != "bias"} | ({"bias": x["bias"]} if "bias" in x else {})
    out = loss(x["hidden"], x["weight"], p.targets, *args, **kwargs, **options)
    value = out if isinstance(out, Tensor) else out.loss
    assert value.requires_grad, "the loss has no gradient"
    (value * UPSTREAM).backward()
    return value.detach(), {k: v.grad for k, v in x.items()}


def check(
    loss: Callable[..., Any], oracle: Callable[..., Tensor], p: Problem, /, *args: Any, backend: str, **kwargs: Any
) -> None:
    """Value and gradients of a loss against the oracle, with the whole batch in memory and in small pieces."""
    dtype = p.hidden.dtype
    exact, exact_grads = run(oracle, p, args, {**kwargs, "dtype": torch.float64}, double=True)
    upcast, _ = run(oracle, p, args, {**kwargs, "dtype": torch.promote_types(dtype, torch.float32)})
    _, plain_grads = run(oracle, p, args, {**kwargs, "dtype": dtype})
    scale = max(1.0, true_logp(p).abs().max().item())
    for max_bytes in (None, small_budget(p)):
        got, grads = run(loss, p, args, {**kwargs, "backend": backend, "max_bytes": max_bytes})
        assert_value(f"loss (max_bytes={max_bytes})", got, exact, upcast, dtype, scale)
        for name, grad in grads.items():
            plain, true = plain_grads[name], exact_grads[name]
            assert plain is not None
            assert true is not None
            assert_gradient(f"gradient of {name} (max_bytes={max_bytes})", grad, true, plain, dtype)
        ignored = grads["hidden"]
        assert ignored is not None
        assert not ignored[~p.kept].any(), "an ignored row has a gradient"


def small_budget(p: Problem) -> int:
    """Room for a few rows of float32 logits and as many exponentials, so that several passes are needed.

    Triton's interpreter is slow, and its backend needs more beside the logits, so it gets room for more.
    """
    return (24 if os.environ.get("TRITON_INTERPRET") == "1" else 7) * p.weight.shape[0] * 8
