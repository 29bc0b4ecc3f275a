"""Float64 truth about a batch, never holding the full logits, and how far a result is from it.

Legend: N tokens, H hidden, V vocabulary, R sampled rows, C sampled columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 128
SAMPLED = 32


class Truth(NamedTuple):
    logp: Tensor  # [N] float64
    entropy: Tensor  # [N]
    largest_logit: float  # by magnitude; rounding errors are relative to it
    rows: Tensor  # [R]
    columns: Tensor  # [C]
    mean_weight: Tensor  # [R, H] expectation of the weight's rows under each sampled token's distribution
    probabilities: Tensor  # [N, C]


class Result(NamedTuple):
    """What a contender hands back; None where it has no such output."""

    loss: Tensor | None = None
    logp: Tensor | None = None  # [N], or [kept]
    entropy: Tensor | None = None  # [N]
    grad_hidden: Tensor | None = None  # [..., H]
    grad_weight: Tensor | None = None  # [V, H]


class Expected(NamedTuple):
    loss: float
    grad_hidden: Tensor  # [R, H]
    grad_weight: Tensor  # [C, H]
    zero_rows: float  # share of the kept rows whose gradient is exactly zero


def truth_of(
    hidden: Tensor, weight: Tensor, targets: Tensor | None, rng: torch.Generator, argmax: float = 0.1
) -> tuple[Tensor, Truth]:
    """Targets (sampled from the softmax if None, a share of them its argmax) and the truth about them."""
    n, weight64 = hidden.shape[0], weight.double()
    rows = torch.randperm(n, generator=rng)[:SAMPLED].sort().values
    logp, entropy = torch.empty(2, n, dtype=torch.float64)
    drawn = torch.empty(n, dtype=torch.int64) if targets is None else targets
    mean_weight, lse, largest = [], torch.empty(n, dtype=torch.float64), 0.0
    for a in range(0, n, CHUNK):
        part = slice(a, min(a + CHUNK, n))
        z = hidden[part].double() @ weight64.t()
        largest = max(largest, z.abs().max().item())
        lse[part] = z.logsumexp(-1)
        p = (z - lse[part, None]).exp()
        if targets is None:
            sampled = torch.multinomial(p.float(), 1, generator=rng).squeeze(1)
            drawn[part] = torch.where(torch.rand(len(p), generator=rng) < argmax, z.argmax(-1), sampled)
        logp[part] = z.gather(-1, drawn[part, None]).squeeze(1) - lse[part]
        entropy[part] = lse[part] - (p * z).sum(-1)
        mean_weight.append(p[rows[(rows >= part.start) & (rows < part.stop)] - part.start] @ weight64)
    seen = drawn[torch.randperm(n, generator=rng)[:SAMPLED]]
    columns = torch.cat([seen, torch.randint(weight.shape[0], (SAMPLED,), generator=rng)]).unique()
    probabilities = (hidden.double() @ weight64[columns].t() - lse[:, None]).exp()
    return drawn, Truth(logp, entropy, largest, rows, columns, torch.cat(mean_weight), probabilities)


def expect(
    loss_of: Callable[[Tensor], Tensor], truth: Truth, hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor
) -> Expected:
    """Value and sampled gradients of a loss of log-probabilities, in float64."""
    logp = truth.logp.clone().requires_grad_()
    loss = loss_of(logp)
    (g,) = torch.autograd.grad(loss, logp)
    own = weight[targets[truth.rows]].double()
    onehot = (targets[:, None] == truth.columns).double()
    return Expected(
        loss=loss.item(),
        grad_hidden=g[truth.rows, None] * (own - truth.mean_weight),
        grad_weight=(g[:, None] * (onehot - truth.probabilities)).t() @ hidden.double(),
        zero_rows=(g[kept] == 0).double().mean().item(),
    )


def _relative(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


def errors_of(result: Result, truth: Truth, expected: Expected | None, kept: Tensor) -> dict[str, float]:
    """Distance from float64 of everything the contender handed back."""
    found: dict[str, float] = {}
    if result.logp is not None:
        logp = result.logp.detach().double()
        off = (logp if logp.numel() != kept.numel() else logp[kept]) - truth.logp[kept]
        found |= {"logp_max": off.abs().max().item(), "logp_mean": off.abs().mean().item()}
    if result.entropy is not None:
        found["entropy_max"] = (result.entropy.detach().double() - truth.entropy).abs().max().item()
    if result.loss is not None and expected is not None:
        found["loss"] = abs(result.loss.item() - expected.loss)
    if result.grad_hidden is not None and expected is not None:
        grad = result.grad_hidden.reshape(-1, result.grad_hidden.shape[-1])
        found["grad_hidden"] = _relative(grad[truth.rows], expected.grad_hidden)
    if result.grad_weight is not None and expected is not None:
        found["grad_weight"] = _relative(result.grad_weight[truth.columns], expected.grad_weight)
    return found


def verdict(errors: dict[str, float], dtype: torch.dtype, largest_logit: float) -> str:
    """ "ok", or "wrong" and in what: errors beyond what logits rounded to the dtype of the inputs explain.

    bfloat16 logits are off by up to 2^-8 of their size; twice that is allowed for a log-probability. A wrong
    contender is shown, and is nobody's rival.
    """
    rounded = dtype != torch.float32
    logp = largest_logit * 2.0**-7 if rounded else 1e-3
    grad = 0.1 if rounded else 1e-3
    limits = {"logp_max": logp, "logp_mean": logp / 4, "entropy_max": 4 * logp, "loss": logp, "grad": grad}
    over = [name for name, x in errors.items() if not x <= limits[name if name in limits else "grad"]]
    return f"wrong: {', '.join(over)}" if over else "ok"
