"""Generalised advantage estimation over packed sequences in plain torch: no loop over tokens, no host synchronisation.

Legend: N packed rows, S sequences.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def implementation(backend: Any, device: torch.device) -> Any:
    """Whose ``gae`` runs: the backend's own; on a GPU without one that of the CUDA extension; else this module's.

    ``whitened_gae``, where there is one, takes an epsilon more and whitens on the way.
    """
    if hasattr(backend, "gae"):
        return backend
    free = os.environ.get("RLHF_KERNELS_BACKEND", "auto") == "auto"
    return (_cuda() if device.type == "cuda" and free else None) or sys.modules[__name__]


@functools.cache
def _cuda() -> ModuleType | None:
    try:
        return importlib.import_module("rlhf_kernels.backends.cuda_gae")
    except ImportError:  # built without nvcc
        return None


def gae(
    rewards: Tensor,  # [N] float32 or float64, like values and bootstrap
    values: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    mask: Tensor | None,  # [N] bool, None is all true
    bootstrap: Tensor | None,  # [S], None is zero
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] and zero where ``mask`` is false.

    ``A[t] = r[t] - V[t] + C[t]`` where C is what the rows after t pay it: ``gamma * lam * A[t'] + gamma * V[t']`` of
    the next row t' that counts. C[t] is an affine function of C[t+1], passed on by rows that do not count.
    """
    rows, sequences = rewards.numel(), cu_seqlens.numel() - 1
    if rows == 0 or sequences == 0:
        return torch.zeros_like(values), torch.zeros_like(values)
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    zero, decay = values.new_zeros(()), gamma * lam
    position = torch.arange(rows, device=rewards.device)
    of = torch.repeat_interleave(torch.arange(sequences, device=rewards.device), cu_seqlens.diff(), output_size=rows)
    last = position + 1 == cu_seqlens[of + 1]

    # C[t] = pays[t] + share[t] * C[t+1]
    pays = torch.where(kept, decay * rewards + (gamma - decay) * values, zero).roll(-1)
    pays = torch.where(last, zero if bootstrap is None else gamma * bootstrap[of], pays)
    share = torch.ones_like(values).masked_fill(kept, decay).roll(-1).masked_fill(last, 0.0)

    # Composed with itself over twice the distance in each round. A share of nothing forgets even what is not finite.
    longest = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" else rows
    distance = 1
    while distance < longest:
        far = torch.where(share[:-distance] == 0, zero, share[:-distance] * pays[distance:])
        pays = torch.cat([pays[:-distance] + far, pays[-distance:]])
        share = torch.cat([share[:-distance] * share[distance:], torch.zeros_like(share[-distance:])])
        distance *= 2
    returns = rewards + pays
    return torch.where(kept, returns - values, zero), torch.where(kept, returns, zero)
