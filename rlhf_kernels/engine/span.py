"""Consecutive kept rows on their way through the head: statistics now, gradients once they are known.

Both ways through the engine are made of spans. The op is one span over all rows; the fused loss is one span after
another, each as large as the byte budget allows, so that it never recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from rlhf_kernels.backends.vocab_parallel import VocabParallel
from rlhf_kernels.engine.call import Call
from rlhf_kernels.engine.explain import explain, explain_gradient
from rlhf_kernels.types import Entries, Grads, Sinks, SparseBackend, TokenStats

WORTH_A_WAIT = 1e12  # operations of the last two products: more than a millisecond of any GPU


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Losses:
    """What a tolerance has cost so far: squared norms of gradients of logits, and rows."""

    lost: Tensor | float = 0.0
    norm: Tensor | float = 0.0
    dense: int = 0
    rows: int = 0

    def add(self, entries: Entries, rows: int) -> None:
        self.lost, self.norm = self.lost + entries.lost.sum(), self.norm + entries.norm.sum()
        self.dense, self.rows = self.dense + entries.others.numel(), self.rows + rows

    def metrics(self, like: Tensor) -> dict[str, Tensor]:
        """What the logits' gradient has lost at most (L2), and the share of rows that keep everything."""
        lost = (float(self.lost) / max(float(self.norm), 1e-300)) ** 0.5
        dense = self.dense / max(1, self.rows)
        return {"tolerance/lost": like.new_tensor(lost), "tolerance/dense": like.new_tensor(dense)}


@dataclass(eq=False)
class Gradients:
    """Where the gradients of a whole call end up. None: nobody wants it."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]
    fresh: bool  # weight and bias hold nothing yet, not even zeros
    losses: Losses = field(default_factory=lambda: Losses())

    @staticmethod
    def of(call: Call, wanted: tuple[bool, bool, bool]) -> Gradients:
        """Nothing found so far. Weight and bias are for the first piece to fill, or for ``filled``."""
        full = stats_dtype(call.hidden.dtype)
        # float16 has no room for gradients that are still to be scaled
        dtype = full if call.hidden.dtype == torch.float16 else call.hidden.dtype
        given, weight, bias = call.weight_grad, call.head.weight, call.head.bias
        if not wanted[1] or weight is None:
            weight = None
        elif given is not None:
            weight = given[: call.vocab]
        else:  # what several pieces add up to is rounded after the last of them
            once = call.rows <= call.tile_rows()
            weight = weight.new_empty(weight.shape, dtype=dtype if once else full)
        if not wanted[2] or bias is None:
            bias = None
        else:
            bias = bias.new_empty(bias.shape, dtype=full) if given is None else bias.new_zeros(bias.shape, dtype=full)
        hidden = call.hidden.new_zeros(call.hidden.shape, dtype=dtype) if wanted[0] else None
        return Gradients(hidden, weight, bias, fresh=given is None)

    def filled(self) -> Gradients:
        """The same, zero where no row had a gradient."""
        if self.fresh:
            for g in (self.weight, self.bias):
                if g is not None:
                    g.zero_()
        self.fresh = False
        return self


def _pieces(start: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """Cut start..stop into equal pieces of at most ``rows`` (one empty piece if there is nothing)."""
    count = max(1, -(-(stop - start) // rows))
    size = max(1, -(-(stop - start) // count))
    return [(i, min(i + size, stop)) for i in range(start, stop, size)] or [(start, stop)]


def _joined(parts: list[TokenStats]) -> TokenStats:
    columns = zip(*parts, strict=True)
    return TokenStats(*(None if x[0] is None else torch.cat(x) for x in columns))  # type: ignore[arg-type]


@contextmanager
def _within_budget(call: Call) -> Iterator[None]:
    """Whoever runs out of memory hears what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"rlhf_kernels: the logits of {min(call.rows, call.tile_rows())} rows were to be held at once, in up to "
            f"max_bytes={call.max_bytes}; pass a smaller one"
        )
        raise


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
        self.pieces: list[tuple[int, int]] = []
        self.residuals: dict[int, Any] = {}  # Their keys are the first rows of their pieces.
        parts: list[TokenStats] = []
        for i, (a, b) in enumerate(pieces):
            with _within_budget(call):
                tile, keeps = call.tile(a, b), i < self.stash
                stats, residual = call.backend.forward(tile) if keeps else (call.backend.score(tile), None)
            if call.checks and b > a:
                explain(stats, tile)
            self.pieces.append((a, b))
            self.residuals[a] = residual
            parts.append(stats)
        self.stats = parts[0] if len(parts) == 1 else _joined(parts)

    def backward(self, grads: Grads, into: Gradients) -> None:
        """Add the gradients of these rows; rows whose gradient is exactly zero are skipped. Uses up the residuals."""
        for i, (a, b) in enumerate(self.pieces):
            residual = self.residuals.pop(a, None)  # Of threads that run backward at once, one gets it.
            part = slice(a - self.start, b - self.start)
            here = grads.each(lambda g, part=part: g[part])
            with _within_budget(self.call):
                stats = self.stats.each(lambda x, part=part: x[part])
                self._piece(a, b, residual, i < self.stash, stats, here, into)

    def _piece(
        self, a: int, b: int, residual: Any, remembered: bool, stats: TokenStats, grads: Grads, into: Gradients
    ) -> None:
        call = self.call
        rows = _active(grads) if self._counts(b - a) else None
        if a == b or (rows is not None and rows.numel() == 0):
            return
        some = None if rows is None or rows.numel() == b - a else rows
        tile, chosen = call.tile(a, b), some
        if residual is None:
            # Only the rows that matter are computed again; all of them where an earlier backward had all of them, since
            # a product of another shape may give other bits.
            if some is not None and not remembered:
                tile, some, grads = call.tile(a, b, chosen), None, grads.each(lambda g: g[chosen])
            stats, residual = call.backend.forward(tile)

        def dense(rows: Tensor | None) -> Callable[[Sinks], None]:
            return lambda sinks: call.backend.backward(tile, residual, stats, grads, rows, sinks)

        if call.tolerance is None:
            return self._leave(a, b, chosen, into, dense(some))
        backend = cast(SparseBackend, call.backend)
        entries = backend.select(tile, residual, stats, grads, some, call.tolerance)
        count = len(stats.logp) if some is None else some.numel()
        into.losses.add(entries, count)
        if entries.others.numel() == count:
            return self._leave(a, b, chosen, into, dense(some))
        whose = chosen if some is None else None  # the rows of a tile that was cut out of the piece
        for rows, work in (
            (entries.others, dense(entries.others)),
            (entries.rows, lambda sinks: backend.multiply(tile, entries, sinks)),
        ):
            if rows.numel():
                self._leave(a, b, rows if whose is None else whose[rows], into, work)

    def _counts(self, rows: int) -> bool:
        """Whether rows without a gradient are looked for: on a GPU, where that is a wait, if they may be worth it."""
        call = self.call
        if call.tolerance is not None:  # which waits anyway
            return True
        if call.overwrite or call.kept.real is not None:
            return False
        size = 0 if call.head.weight is None else call.head.weight.numel()
        return not call.hidden.is_cuda or 4.0 * rows * size >= WORTH_A_WAIT

    def _leave(self, a: int, b: int, rows: Tensor | None, into: Gradients, work: Callable[[Sinks], None]) -> None:
        """Have the gradients of some rows of a..b (None: all) made, and put them where they belong."""
        kept, out = self.call.kept, None
        direct = kept.index is None and rows is None
        if into.hidden is not None:
            count = b - a if rows is None else rows.numel()
            out = into.hidden[a:b] if direct else into.hidden.new_empty(count, into.hidden.shape[1])
        work(Sinks(out, into.weight, into.bias, into.fresh))
        into.fresh = False
        # Of ranks that share a head only one may have the weight to blame, and the others would wait for it.
        if out is not None and self.call.checks and not isinstance(self.call.backend, VocabParallel):
            explain_gradient(out, self.call.head)
        if into.hidden is not None and out is not None and not direct:
            kept.put(out, a, into.hidden, rows)


def _active(grads: Grads) -> Tensor:
    """Rows with a gradient of any statistic that is not zero."""
    active = (grads.logp != 0).any(1)
    for g in grads[1:]:
        if g is not None:
            active |= g != 0
    return active.nonzero().squeeze(1)
