"""Float64 truth about a batch, never holding the full logits.

Legend: N tokens, H hidden, V vocabulary, R sampled rows, C sampled columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 128
ROWS, COLUMNS = 256, 32  # sampled: rows that are all but certain have hardly a gradient, so there must be many


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
    grad_hidden: Tensor | None = None  # [N, H]
    grad_weight: Tensor | None = None  # [V, H]
    kl: Tensor | None = None  # [N], or [kept]
    grad_logits: Tensor | None = None  # [N, V]
    forward_s: Callable[[], float] | None = None  # seconds of the part before the gradients
    value: Callable[..., Tensor] | None = None  # of (logp, None, batch): what its loss is, where only gradients agree


class Expected(NamedTuple):
    loss: float
    slope: float  # L2 norm of the loss's derivatives by the N statistics: how far rounding them moves it
    zero_rows: float  # share of the kept rows whose gradient is exactly zero
    grad_hidden: Tensor | None = None  # [R, H]
    grad_weight: Tensor | None = None  # [C, H]
    grad_logits: Tensor | None = None  # [R, V]
    kl: Tensor | None = None  # [N]


def truth_of(
    hidden: Tensor, weight: Tensor, targets: Tensor | None, rng: torch.Generator, argmax: float = 0.1
) -> tuple[Tensor, Truth]:
    """Targets (sampled from the softmax if None, a share of them its argmax) and the truth about them."""
    n, weight64, on = hidden.shape[0], weight.double(), hidden.device
    sampler = rng if on.type == "cpu" else torch.Generator(on).manual_seed(rng.initial_seed())
    rows = torch.randperm(n, generator=rng)[:ROWS].sort().values.to(on)
    logp, entropy, lse = torch.empty(3, n, dtype=torch.float64, device=on)
    drawn = torch.empty(n, dtype=torch.int64, device=on) if targets is None else targets
    mean_weight, largest = [], 0.0
    for a in range(0, n, CHUNK):
        part = slice(a, min(a + CHUNK, n))
        z = hidden[part].double() @ weight64.t()
        largest = max(largest, z.abs().max().item())
        lse[part] = z.logsumexp(-1)
        p = (z - lse[part, None]).exp()
        if targets is None:
            sampled = torch.multinomial(p.float(), 1, generator=sampler).squeeze(1)
            likeliest = torch.rand(len(p), generator=sampler, device=on) < argmax
            drawn[part] = torch.where(likeliest, z.argmax(-1), sampled)
        logp[part] = z.gather(-1, drawn[part, None]).squeeze(1) - lse[part]
        entropy[part] = lse[part] - (p * z).sum(-1)
        mean_weight.append(p[rows[(rows >= part.start) & (rows < part.stop)] - part.start] @ weight64)
    seen = drawn[torch.randperm(n, generator=rng)[:COLUMNS].to(on)]
    columns = torch.cat([seen, torch.randint(weight.shape[0], (COLUMNS,), generator=rng).to(on)]).unique()
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
        slope=g.norm().item(),
        zero_rows=(g[kept] == 0).double().mean().item(),
        grad_hidden=g[truth.rows, None] * (own - truth.mean_weight),
        grad_weight=(g[:, None] * (onehot - truth.probabilities)).t() @ hidden.double(),
    )


def expect_kl(truth: Truth, batch: Any) -> Expected:
    """The mean exact KL(policy | reference) over the kept tokens: each token's, and the sampled gradients."""
    kept, weight64, ref64 = batch.kept, batch.weight.double(), batch.ref_weight.double()
    n = len(kept)
    kl = torch.empty(n, dtype=torch.float64, device=kept.device)
    pulls, at_columns = [], []
    for a in range(0, n, CHUNK):
        part = slice(a, min(a + CHUNK, n))
        logp = (batch.hidden[part].double() @ weight64.t()).log_softmax(-1)
        gap = logp - (batch.ref_hidden[part].double() @ ref64.t()).log_softmax(-1)
        p = logp.exp()
        kl[part] = (p * gap).sum(-1)
        by_logit = p * (gap - kl[part, None])
        pulls.append(by_logit[truth.rows[(truth.rows >= part.start) & (truth.rows < part.stop)] - a] @ weight64)
        at_columns.append(by_logit[:, truth.columns])
    g = kept.double() / kept.sum()
    return Expected(
        loss=(g * kl).sum().item(),
        slope=g.norm().item(),
        zero_rows=0.0,
        grad_hidden=g[truth.rows, None] * torch.cat(pulls),
        grad_weight=(g[:, None] * torch.cat(at_columns)).t() @ batch.hidden.double(),
        kl=kl,
    )


def expect_logits(
    loss_of: Callable[[Tensor], Tensor], truth: Truth, logits: Tensor, targets: Tensor
) -> tuple[Truth, Expected]:
    """The truth when logits, rounded as they are, are what is given; and the sampled gradients by them."""
    n = len(targets)
    logp, entropy = torch.empty(2, n, dtype=torch.float64, device=logits.device)
    for a in range(0, n, CHUNK):
        part = slice(a, min(a + CHUNK, n))
        logp_all = logits[part].double().log_softmax(-1)
        logp[part] = logp_all.gather(-1, targets[part, None]).squeeze(1)
        entropy[part] = -(logp_all.exp() * logp_all).sum(-1)
    leaf = logp.clone().requires_grad_()
    loss = loss_of(leaf)
    (g,) = torch.autograd.grad(loss, leaf)
    rows = truth.rows
    p = logits[rows].double().softmax(-1)
    onehot = torch.nn.functional.one_hot(targets[rows], logits.shape[-1])
    expected = Expected(loss.item(), g.norm().item(), 0.0, grad_logits=g[rows, None] * (onehot - p))
    return truth._replace(logp=logp, entropy=entropy), expected
