"""A tile of rows as the kernels see it: contiguous rows, strides, numbers in place of options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.backends.triton.table import Blocks
from rlhf_kernels.types import Head, Tile

LOWEST_LOGIT = 80.0  # nats below the highest: its exponential is a number still


class Operand(NamedTuple):
    """Hidden states and the head that they meet. Without a weight the hidden states are logits."""

    hidden: Tensor  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def size(self) -> int:
        return self.hidden.shape[1]

    @property
    def ld_hidden(self) -> int:
        return self.hidden.stride(0)

    @property
    def ld_weight(self) -> int:
        return 0 if self.weight is None else self.weight.stride(0)


class Rows(NamedTuple):
    """One tile."""

    policy: Operand
    reference: Operand | None
    targets: Tensor  # [N, K] int64
    temperature: Tensor | None  # [N] float32, None: per_t holds for all
    per_t: float  # one over the temperature
    forward_kl: bool

    @property
    def count(self) -> int:
        return self.targets.shape[0]

    @property
    def vocab(self) -> int:
        return self.policy.size if self.policy.weight is None else self.policy.weight.shape[0]

    @property
    def keeps_exponentials(self) -> bool:
        """Whether bfloat16 exponentials serve the backward. A KL lives on differences of logits, which they lose; and
        a softcap asks for the logit of an exponential, which has none where it underflows.
        """
        cap = self.policy.softcap
        bounded = cap is None or (self.temperature is None and 2 * cap * self.per_t < LOWEST_LOGIT)
        return self.policy.hidden.dtype == torch.bfloat16 and self.reference is None and bounded


Norms = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Residual(NamedTuple):
    """What the backward needs: bfloat16 exponentials, or float32 logits, or nothing but the given logits."""

    kept: Tensor  # [n, V]
    kept_ref: Tensor | None
    norms: Norms  # anchor and log sum e; the reference's


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _operand(hidden: Tensor, head: Head) -> Operand:
    weight = None if head.weight is None else _row_major(head.weight)
    bias = None if head.bias is None else head.bias.contiguous()
    softcap = None if head.softcap is None else float(head.softcap)  # whole numbers would be kernels of their own
    return Operand(_row_major(hidden), weight, bias, softcap, float(head.logit_scale))


def rows_of(tile: Tile) -> Rows:
    """The tile's tensors, copied only where their rows are not contiguous."""
    t, ref = tile.temperature, tile.reference
    each = isinstance(t, Tensor)
    return Rows(
        policy=_operand(tile.hidden, tile.head),
        reference=_operand(ref.hidden, ref.head) if ref else None,
        targets=tile.targets.contiguous(),
        temperature=t.float().contiguous() if isinstance(t, Tensor) else None,
        per_t=1.0 if each else 1.0 / float(t),
        forward_kl=ref is not None and ref.direction == "forward",
    )


def describable(operand: Operand) -> bool:
    """Whether the tensor memory accelerator can read hidden states and weight: halves, aligned to 16 bytes."""
    return all(
        x is not None
        and x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.stride(0) >= x.shape[1]
        for x in (operand.hidden, operand.weight)
    )


def described(operand: Operand, blocks: Blocks) -> tuple[Any, Any]:
    """Descriptors of hidden states and weight."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x: Tensor | None, size: int) -> TensorDescriptor:
        assert x is not None
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [size, blocks.BLOCK_H])

    return describe(operand.hidden, blocks.BLOCK_N), describe(operand.weight, blocks.BLOCK_V)
