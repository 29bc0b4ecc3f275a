"""Sums and broadcasts over packed sequences and groups, without a loop, an atomic or a host synchronisation.

Legend: N packed rows, S sequences, G groups, K members of the largest group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.checks import is_count, tensor, wants

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [S] sums over each sequence, zero where it is empty.

    Accumulated in double: a reply of 4096 tokens sums to thousands of nats, and float32 would lose a milli-nat of it.
    """
    return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens).to(x.dtype)


def acting(cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """[S] bool: whether the mask [N] (None: all true) is true anywhere in a sequence."""
    if mask is None:
        return cu_seqlens.diff() > 0
    return torch.cat([cu_seqlens.new_zeros(1), mask.cumsum(0)])[cu_seqlens].diff() > 0


def spread(x: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """[S] -> [N]: each row gets the value of its sequence."""
    return torch.repeat_interleave(x, cu_seqlens.diff(), output_size=rows)


class Groups(NamedTuple):
    """Where the members of each group lie; short groups are padded."""

    index: Tensor  # [G, K] int64 positions in the flat tensor, any valid position where padded
    member: Tensor  # [G, K] bool, false where padded

    def gather(self, x: Tensor) -> Tensor:
        """[S] -> [G, K], differentiable; padding holds somebody else's value."""
        return x[self.index]

    def scatter(self, x: Tensor, size: int) -> Tensor:
        """[G, K] -> [S], the inverse of ``gather``."""
        out = x.new_empty(size)
        out[self.index[self.member]] = x[self.member]
        return out


def group_layout(groups: int | Tensor, like: Tensor) -> Groups:
    """Lay out consecutive groups of K, or groups named by [S] integer ids in any order, for the [S] tensor ``like``.

    Raises:
        TypeError: ``groups`` is neither an int nor a tensor.
        ValueError: K does not divide S, or the ids are not [S] integers on the device of ``like``.
    """
    size = like.numel()
    if isinstance(groups, int) and not isinstance(groups, bool):
        wants(
            is_count(groups) and size % groups == 0, "groups", groups, f"a positive divisor of the {size} scores given"
        )
        index = torch.arange(size, device=like.device).reshape(-1, groups)
        return Groups(index, torch.ones_like(index, dtype=torch.bool))
    tensor("groups", groups, "an int or an integer tensor [S]")
    assert isinstance(groups, Tensor)
    fits = groups.dtype in INTEGERS and tuple(groups.shape) == (size,)
    wants(fits, "groups", groups, f"an int, or integer ids of shape [{size}]")
    wants(groups.device == like.device, "groups", groups, f"device {like.device}, where scores is")
    order = groups.argsort(stable=True)
    counts = torch.unique_consecutive(groups[order], return_counts=True)[1]
    slots = torch.arange(int(counts.max()) if size else 1, device=like.device)
    member = slots < counts[:, None]
    index = (counts.cumsum(0) - counts)[:, None] + slots
    return Groups(order[index.clamp(max=max(size - 1, 0))], member)
