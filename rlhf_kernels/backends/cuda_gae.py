"""Packed advantages by the CUDA extension, in two launches, whitening included; without Triton.

Legend: N packed rows, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _cuda


def gae(
    rewards: Tensor,  # [N] float32 or float64, like values and bootstrap
    values: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1] int32 or int64
    mask: Tensor | None,  # [N] bool, None is all true
    bootstrap: Tensor | None,  # [S], None is zero
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] and zero where ``mask`` is false; contiguous tensors of one GPU."""
    return _launch(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, None)


def whitened_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None,
    gamma: float, lam: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``gae``, with advantages of mean zero and variance one over ``mask``, in as many launches."""
    return _launch(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, eps)


def _launch(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None,
    gamma: float, lam: float, eps: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def at(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    if not values.is_cuda:  # a host address would be read on the device
        raise ValueError(f"values: got a tensor on {values.device}, wants one on a GPU")
    N, ends = rewards.numel(), cu_seqlens.long()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    scratch = torch.empty(_cuda.GAE_SCRATCH_BYTES, dtype=torch.uint8, device=values.device)
    stream = torch.cuda.current_stream(values.device).cuda_stream
    _cuda.gae(
        values.dtype == torch.float64, at(rewards), at(values), at(ends), at(mask), at(bootstrap), at(advantages),
        at(returns), at(scratch), N, ends.numel() - 1, gamma, lam, eps or 0.0, eps is not None, values.get_device(),
        stream,
    )  # fmt: skip
    return advantages, returns
