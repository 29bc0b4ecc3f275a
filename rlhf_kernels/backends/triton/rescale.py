"""Gradients times what reached the loss from above, which only the device knows, and which nearly always is one."""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit(do_not_specialize_on_alignment=["scale"])
def rescale_kernel(x, scale, size, BLOCK: tl.constexpr):
    by = tl.load(scale).to(tl.float32)
    if by == 1.0:  # nothing is read then, where a product would read and write all of a head
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(x + at, (value * by).to(x.dtype.element_ty), mask=at < size)


def rescale(x: Tensor, scale: Tensor) -> None:
    """Multiply contiguous ``x`` in place by the number in ``scale``, which nobody waits for."""
    assert x.is_contiguous()
    with torch.cuda.device_of(x):
        rescale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, scale, x.numel(), BLOCK=BLOCK, num_warps=8)
