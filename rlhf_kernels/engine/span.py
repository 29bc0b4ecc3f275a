"""Consecutive kept rows on their way through the head: statistics now, gradients once they are known.

Both ways through the engine are made of spans. The op is one span over all rows; the fused loss is one span after
another, each as large as the byte budget allows, so that it never recomputes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.engine.call import Call
from rlhf_kernels.types import Grads, Sinks, TokenStats


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Gradients(NamedTuple):
    """Where the gradients of a whole call end up. None: nobody wants it."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]

    @staticmethod
    def zeros(call: Call, wanted: tuple[bool, bool, bool]) -> Gradients:
        full = stats_dtype(call.hidden.dtype)
        # float16 has no room for gradients that are still to be scaled
        dtype = full if call.hidden.dtype == torch.float16 else call.hidden.dtype
        weight, bias = call.head.weight, call.head.bias
        fresh_weight = wanted[1] and weight is not None and call.weight_grad is None
        return Gradients(
            hidden=call.hidden.new_zeros(call.hidden.shape, dtype=dtype) if wanted[0] else None,
            weight=weight.new_zeros(weight.shape, dtype=full) if fresh_weight and weight is not None
            else call.weight_grad[: call.vocab] if wanted[1] and call.weight_grad is not None else None,
            bias=torch.zeros_like(bias, dtype=full) if wanted[2] and bias is not None else None,
        )  # fmt: skip


def _pieces(start: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """Cut start..stop into equal pieces of at most ``rows`` (one empty piece if there is nothing)."""
    count = max(1, -(-(stop - start) // rows))
    size = max(1, -(-(stop - start) // count))
    return [(i, min(i + size, stop)) for i in range(start, stop, size)] or [(start, stop)]


def _joined(parts: list[TokenStats]) -> TokenStats:
    columns = zip(*parts, strict=True)
    return TokenStats(*(None if x[0] is None else torch.cat(x) for x in columns))  # type: ignore[arg-type]


class Span:
    """Statistics of kept rows start to stop; ``keep`` says whether gradients may be asked for."""

    def __init__(self, call: Call, start: int, stop: int, keep: bool):
        self.call, self.start, self.stop = call, start, stop
        budget = call.tile_rows()
        if not keep:
            pieces, self.stash = _pieces(start, stop, call.score_rows()), 0
        elif stop - start <= budget:
            pieces, self.stash = [(start, stop)], 1
        else:
            # half the budget remembers, the other half is where the rest will be computed once more
            pieces, self.stash = _pieces(start, stop, max(1, budget // 2)), 1 if budget > 1 else 0
        self.pieces: list[tuple[int, int, Any]] = []
        parts: list[TokenStats] = []
        for i, (a, b) in enumerate(pieces):
            stats, residual = (
                call.backend.forward(call.tile(a, b)) if i < self.stash else (call.backend.score(call.tile(a, b)), None)
            )
            if call.checks and i == 0 and b > a:
                check.explain_logits(stats.lse, call.head.weight, call.head.bias)
            self.pieces.append((a, b, residual))
            parts.append(stats)
        self.stats = parts[0] if len(parts) == 1 else _joined(parts)

    def backward(self, grads: Grads, into: Gradients) -> None:
        """Add the gradients of these rows; rows whose gradient is exactly zero are skipped. Uses up the residuals."""
        if into == (None, None, None):
            return
        for a, b, residual in self.pieces:
            part = slice(a - self.start, b - self.start)
            here = Grads(*(g[part] for g in grads))
            self._piece(a, b, residual, self.stats.each(lambda x, part=part: x[part]), here, into)
        self.pieces = [(a, b, None) for a, b, _ in self.pieces]

    def _piece(self, a: int, b: int, residual: Any, stats: TokenStats, grads: Grads, into: Gradients) -> None:
        call = self.call
        active = (grads.logp != 0).any(1)
        for g in grads[1:]:
            active |= g != 0
        rows = active.nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        some = None if rows.numel() == b - a else rows
        at = torch.arange(a, b, device=active.device)[active] if call.kept is None else call.kept[a:b][rows]
        tile = call.tile(a, b)
        if residual is None:
            if some is not None:  # nothing is remembered, so only the rows that matter are computed again
                tile, some = call.tile(a, b, rows), None
                grads = Grads(*(g[rows] for g in grads))
            stats, residual = call.backend.forward(tile)
        direct = into.hidden is not None and call.kept is None and rows.numel() == b - a
        out = None
        if into.hidden is not None:
            out = into.hidden[a:b] if direct else into.hidden.new_empty(rows.numel(), into.hidden.shape[1])
        call.backend.backward(tile, residual, stats, grads, some, Sinks(out, into.weight, into.bias))
        if into.hidden is not None and out is not None and not direct:
            into.hidden.index_copy_(0, at, out)
