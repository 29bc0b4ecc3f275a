"""What the head says about each token: the whole logits, a softmax, and sums over the vocabulary.

``dtype`` is the precision of the matrix product. float64 is the truth; float32 is torch on upcast inputs, and the
dtype of a half-precision model is plain torch, the two yardsticks that everything else is measured by. Whatever
follows the matrix product is at least float32, as ``logits.float().log_softmax(-1)`` is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stats(NamedTuple):
    """Shaped like the targets, zero where ignored."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    mean_logit: Tensor
    top1: Tensor


def materialised_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, [..., V]."""
    weight = weight[:vocab_size].to(dtype)
    bias = None if bias is None else bias[:vocab_size].to(dtype)
    logits = F.linear(hidden.to(dtype), weight, bias).to(torch.promote_types(dtype, torch.float32))
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype)[..., None]
    return logits / temperature


def kept_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, head: dict
) -> tuple[Tensor, Tensor]:
    """Logits of the rows that count, [n, V], and which of the flattened rows they are, [N] bool."""
    kept = targets.flatten() != ignore_index
    temperature = head.get("temperature", 1.0)
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        head = {**head, "temperature": temperature.expand(targets.shape).flatten()[kept]}
    return materialised_logits(hidden.reshape(-1, hidden.shape[-1])[kept], weight, **head), kept


def put_back(x: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """Scatter the values of the kept rows among zeros."""
    return x.new_zeros(kept.shape).masked_scatter(kept, x).view(shape)


def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, **head) -> Stats:
    """(logp, entropy, lse, mean_logit, top1) of each token."""
    logits, kept = kept_logits(hidden, weight, targets, ignore_index, head)
    target = targets.flatten()[kept][:, None]
    log_p = logits.log_softmax(-1)
    stats = Stats(
        logp=log_p.gather(-1, target).squeeze(-1),
        entropy=expectation(log_p, -log_p),
        lse=logits.logsumexp(-1),
        mean_logit=logits.mean(-1),
        top1=(logits <= logits.gather(-1, target)).all(-1).to(logits.dtype),
    )
    return Stats(*(put_back(x, kept, targets.shape) for x in stats))


def token_logps(hidden: Tensor, weight: Tensor, token_ids: Tensor, *, ignore_index: int = -100, **head) -> Tensor:
    """[..., K] log-probabilities of K chosen ids per position, zero where ignored."""
    log_p = materialised_logits(hidden, weight, **head).log_softmax(-1)
    kept = token_ids != ignore_index
    return log_p.gather(-1, token_ids.where(kept, 0)).where(kept, 0.0)


def kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    *,
    direction: str = "reverse",
    ref_head: dict | None = None,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """Exact KL per token over the whole vocabulary: reverse is KL(policy | reference), forward the other way.

    ``ref_head`` holds what differs for the reference (bias, softcap, logit_scale); by default it has no bias, softcap
    or scale. Temperature and vocabulary are shared.
    """
    shared = {k: head[k] for k in ("temperature", "vocab_size", "dtype") if k in head}
    policy, kept = kept_logits(hidden, weight, targets, ignore_index, head)
    reference, _ = kept_logits(ref_hidden, ref_weight, targets, ignore_index, {**shared, **(ref_head or {})})
    log_p, log_q = policy.log_softmax(-1), reference.detach().log_softmax(-1)
    p, q = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    kl = expectation(p, p - q)
    return put_back(kl, kept, targets.shape)


def expectation(log_p: Tensor, x: Tensor) -> Tensor:
    """Mean of x under p over the vocabulary, where an outcome of probability zero counts for nothing."""
    return (log_p.exp() * x.where(log_p > -torch.inf, 0.0)).sum(-1)
