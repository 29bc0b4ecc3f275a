"""Which rows meet the head. To count them is the one time that a call waits for a GPU; a bound spares it that too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels import checks as check


@dataclass(frozen=True)
class Kept:
    """Rows whose target is not ignored, in order; under a bound, followed by rows that stand for nothing."""

    rows: int
    index: Tensor | None = None  # [rows] ascending; None is all
    real: Tensor | None = None  # [rows] bool under a bound
    place: Tensor | None = None  # [N] under a bound: where among the kept rows each row is, -1 for the ignored

    @staticmethod
    def of(alive: Tensor, most: int | None) -> Kept:
        """The rows where ``alive`` [N] holds; at most ``most`` of them, if that is known."""
        if most is None:
            index = alive.nonzero().squeeze(1)
            return Kept(index.numel(), None if index.numel() == alive.numel() else index)
        place = torch.where(alive, alive.cumsum(0) - 1, -1)
        count = alive.sum()
        message = f"max_targets: got {most}, wants at least as many as there are targets that are not ignored"
        check.holds(count <= most, message if alive.is_cuda else f"{message}, here {int(count)}")
        # the last slot is where the ignored rows go, and where nobody looks
        slot = torch.where(place < 0, most, place).clamp(max=most)
        source = torch.arange(alive.numel(), device=alive.device)
        index = torch.zeros(most + 1, dtype=torch.int64, device=alive.device).scatter_(0, slot, source)[:most]
        return Kept(most, index, torch.arange(most, device=alive.device) < count, place)

    def ignored(self, index: Tensor, count: int) -> Tensor:
        """[N] bool: which of ``count`` rows are not kept, where not all of them are."""
        if self.place is not None:  # Slots that stand for nothing all point to row 0.
            return self.place < 0
        return torch.ones(count, dtype=torch.bool, device=index.device).index_fill_(0, index, False)

    def pick(self, x: Tensor, start: int, stop: int, fill: float = 0) -> Tensor:
        """Kept rows start to stop of a [N, ...] tensor; ``fill`` in those that stand for nothing."""
        part = x[start:stop] if self.index is None else x[self.index[start:stop]]
        return self.only_real(part, start, fill)

    def only_real(self, part: Tensor, start: int, fill: float = 0) -> Tensor:
        """``part`` holds kept rows from ``start`` on; those that stand for nothing become ``fill``."""
        if self.real is None:
            return part
        nothing = ~self.real[start : start + part.shape[0]]
        return part.masked_fill(nothing.view(-1, *(1,) * (part.dim() - 1)), fill)

    def put(self, part: Tensor, start: int, into: Tensor, some: Tensor | None = None) -> None:
        """Write kept rows from ``start`` on, or only ``some`` of them, to where they belong in ``into`` [N, ...]."""
        if self.place is not None:
            count = torch.arange(part.shape[0], device=into.device)
            source = torch.full((self.rows + 1,), -1, device=into.device)
            source = source.index_copy(0, start + (count if some is None else some), count)
            source = source[self.place]  # the ignored, at -1, read the last one, which nobody has written
            mine, found = source >= 0, part[source.clamp(min=0)]
            into.copy_(torch.where(mine.view(-1, *(1,) * (part.dim() - 1)), found, into))
            return
        if self.index is None and some is None:
            into[start : start + part.shape[0]] = part
            return
        stop = self.rows if some is not None else start + part.shape[0]
        at = self.index[start:stop] if self.index is not None else torch.arange(start, stop, device=into.device)
        into.index_copy_(0, at if some is None else at[some], part)
