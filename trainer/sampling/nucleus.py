"""Sampling from the likeliest tokens only."""

from __future__ import annotations

import torch
from torch import Tensor


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probabilities of the fewest likeliest tokens that hold at least ``top_p``, renormalised; -inf elsewhere.

    Holtzman et al. 2020, https://arxiv.org/abs/1904.09751. [B, V] to [B, V].

    Example:
        >>> nucleus(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).exp()
        tensor([[0.6250, 0.3750, 0.0000]])
    """
    ordered, at = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = torch.zeros_like(logp, dtype=torch.bool).scatter_(-1, at, before < top_p)
    return torch.log_softmax(logp.masked_fill(~kept, -torch.inf), -1)
