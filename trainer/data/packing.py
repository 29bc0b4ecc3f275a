"""Packed sequences. The shift from inputs to targets happens here and nowhere else.

N packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.base import ranks

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One sequence. Lengths are counted here; nothing downstream infers them from token ids."""

    tokens: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end. Row t holds a token and the target that its hidden state predicts."""

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, from zero in each sequence
    targets: Tensor  # [N] int64, the next token; IGNORE over the prompt and in the last row of each sequence
    cu_seqlens: Tensor  # [S + 1] int32
    lengths: tuple[int, ...]  # the same boundaries on the host, so that nobody has to wait for the device

    @property
    def mask(self) -> Tensor:
        """Rows that predict a response token, [N] bool."""
        return self.targets != IGNORE

    @property
    def last_rows(self) -> Tensor:
        """Row of the last token of each sequence, [S] int64."""
        return self.cu_seqlens[1:].long() - 1

    def select(self, indices: Sequence[int]) -> tuple[Packed, Tensor]:
        """The given sequences, in the given order, and the rows where they stood.

        Returns:
            A smaller ``Packed`` and its rows in this one, [n] int64: index [N] tensors with them.
        """
        starts = self.cu_seqlens.tolist()
        device = self.input_ids.device
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices]).to(device)
        lengths = tuple(self.lengths[i] for i in indices)
        part = Packed(self.input_ids[rows], self.position_ids[rows], self.targets[rows], _cu(lengths, device), lengths)
        return part, rows

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        ids, positions, targets, cu = (
            x.to(device) for x in (self.input_ids, self.position_ids, self.targets, self.cu_seqlens)
        )
        return Packed(ids, positions, targets, cu, self.lengths)


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Packed:
    """Lays samples end to end and shifts their tokens into targets.

    Args:
        samples: At least one, none of them empty.
        device: Where the tensors go.

    Raises:
        ValueError: If there is no sample or one has no token.

    Example:
        >>> pack([Sample([5, 6, 7], 1), Sample([8, 9], 1)]).targets.tolist()
        [6, 7, -100, 9, -100]
    """
    lengths = tuple(len(s.tokens) for s in samples)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"samples: got lengths {list(lengths)}, want at least one sample and no empty one")
    targets: list[int] = []
    for sample in samples:
        # A prompt of no tokens leaves its first response token without a row that could predict it.
        skip = max(sample.prompt_length - 1, 0)
        targets += [IGNORE] * min(skip, len(sample.tokens) - 1) + sample.tokens[skip + 1 :] + [IGNORE]
    packed = Packed(
        input_ids=torch.tensor([t for s in samples for t in s.tokens], dtype=torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=_cu(lengths, "cpu"),
        lengths=lengths,
    )
    return packed.to(device)


def within_budget(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cuts consecutive units (sequences, pairs, groups) into micro-batches of at most ``max_tokens`` tokens.

    Args:
        sizes: Tokens per unit.
        max_tokens: Budget of one micro-batch. A unit that is larger than the budget stands alone.

    Example:
        >>> within_budget([3, 3, 5, 9, 1], max_tokens=8)
        [[0, 1], [2], [3], [4]]
    """
    # Several ranks want a micro-batch each.
    max_tokens = min(max_tokens, -(-sum(sizes) // ranks.count()))
    parts: list[list[int]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(i)
        room -= size
    return parts


def _cu(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
