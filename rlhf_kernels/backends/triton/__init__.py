"""The GPU backend: Triton kernels fold logits while they are near, the vendor's products do what is left.

Two ways lead to the statistics. Fused: a product of ours folds its tiles in registers (``head.py``). In strips: the
vendor's product leaves a strip of float32 logits, and one pass folds it (``rows.py``). A committed table decides.
Nothing here but ``select`` waits for the device.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.backends.sparse import share
from rlhf_kernels.backends.triton import entries
from rlhf_kernels.backends.triton.backward import from_exponentials, from_logits
from rlhf_kernels.backends.triton.compact import only, order_of
from rlhf_kernels.backends.triton.finish import anchors, far_rows, finish
from rlhf_kernels.backends.triton.gradient import calculus
from rlhf_kernels.backends.triton.head import RESCUE_PROGRAMS, fold_head
from rlhf_kernels.backends.triton.operands import Operand, Residual, Rows, describable, rows_of
from rlhf_kernels.backends.triton.products import product
from rlhf_kernels.backends.triton.rescale import rescale
from rlhf_kernels.backends.triton.rows import fold_rows, piece
from rlhf_kernels.backends.triton.simple import fold_strip, is_simple
from rlhf_kernels.backends.triton.table import Blocks, Entry, entry
from rlhf_kernels.backends.triton_gae import gae, whitened_gae
from rlhf_kernels.backends.triton_rewards import shaped_rewards
from rlhf_kernels.types import Entries, Grads, Sinks, Tile, TokenStats

__all__ = [
    "backward", "entries_bytes", "forward", "gae", "multiply", "rescale", "residual_bytes", "score", "select",
    "shaped_rewards", "whitened_gae",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then the kernels run on CPU tensors, slowly
PLANES, PLANES_WITH_REFERENCE = 4, 7


def residual_bytes(tile: Tile) -> int:
    """Bytes per row of what is kept, of a strip of logits, of partial sums, and of what is as long as hidden states."""
    rows = rows_of(tile)
    if rows.policy.weight is None:
        return rows.vocab // 16 + 1024
    here = entry(tile.hidden.device)
    kept = rows.vocab * (2 if rows.keeps_exponentials else 10 if rows.reference else 4)
    plan = Plan.of(rows, here, keeps=True)
    strips = 1 if rows.keeps_exponentials and not plan.fused else 0
    tiles = plan.tiles(rows, here) + RESCUE_PROGRAMS
    partials = 4 * (PLANES_WITH_REFERENCE if rows.reference else PLANES) * tiles
    like_hidden = (18 if rows.policy.hidden.element_size() == 4 else 14) * rows.policy.size
    return kept + strips * 4 * min(here.strip, rows.vocab) + partials + like_hidden + 1024


def score(tile: Tile) -> TokenStats:
    """Statistics only."""
    with torch.cuda.device_of(tile.hidden):  # Triton launches on the current device
        return _statistics(rows_of(tile), None, None)[0]


def forward(tile: Tile) -> tuple[TokenStats, Residual]:
    """Statistics and residual."""
    rows = rows_of(tile)
    kept, kept_ref = rows.policy.hidden, None
    if rows.policy.weight is not None:
        kept = _rows_of_logits(rows, torch.bfloat16 if rows.keeps_exponentials else torch.float32)
        kept_ref = _rows_of_logits(rows, torch.float32) if rows.reference else None
    with torch.cuda.device_of(tile.hidden):
        stats, norms = _statistics(rows, kept if rows.policy.weight is not None else None, kept_ref)
    return stats, Residual(kept, kept_ref, norms)


def backward(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, sinks: Sinks
) -> None:
    """Gradients into the sinks."""
    order, into = None, sinks
    if rows is not None and tile.head.weight is not None:
        order = order_of(rows, stats.entropy.numel())
        rows = rows[order]
        sinks = sinks._replace(hidden=None if into.hidden is None else torch.empty_like(into.hidden))
    if rows is not None:
        tile, stats, grads, residual = only(tile, stats, grads, residual, rows)
    given = rows_of(tile)
    plain = grads.entropy is None and grads.lse is None and grads.mean_logit is None and grads.kl is None
    plain = plain and given.targets.shape[1] == 1 and given.policy.softcap is None and sinks.bias is None
    with torch.cuda.device_of(tile.hidden):
        if plain and given.keeps_exponentials and given.policy.weight is not None:
            from_exponentials(given, residual.kept, residual.norms, stats, grads, sinks)
        else:
            here = entry(tile.hidden.device)
            from_logits(given, residual.kept, residual.kept_ref, residual.norms, stats, grads, sinks, here)
    if order is not None and into.hidden is not None and sinks.hidden is not None:
        into.hidden.index_copy_(0, order, sinks.hidden)


def entries_bytes(tile: Tile) -> int:
    """Bytes per row of what ``select`` finds."""
    vocab = rows_of(tile).vocab
    return entries.BYTES * entries.few(vocab, _half(tile))


def select(
    tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, tolerance: float
) -> Entries:
    """The entries of each row's gradient that matter. Waits for the device, which knows how many there are."""
    given, log_q = rows_of(tile), None
    if grads.kl is not None and residual.kept_ref is not None:
        anchor, log_s = residual.norms[2:]
        assert anchor is not None
        assert log_s is not None
        log_q = residual.kept_ref.gather(1, given.targets) - anchor[:, None] - log_s[:, None]
    few = entries.few(given.vocab, _half(tile))
    part = share(tile, stats, grads, rows, given.vocab, log_q, tolerance, few)
    terms = calculus(given, residual.kept, residual.kept_ref, stats, residual.norms, grads)
    with torch.cuda.device_of(tile.hidden):
        return entries.select(terms, part, given.vocab, _half(tile), entry(tile.hidden.device).pieces)


def multiply(tile: Tile, found: Entries, sinks: Sinks) -> None:
    """Gradients of the rows of these entries into the sinks."""
    with torch.cuda.device_of(tile.hidden):
        entries.multiply(tile, found, sinks)


def _half(tile: Tile) -> bool:
    return tile.hidden.element_size() == 2


class Plan(NamedTuple):
    """Which way a tile goes."""

    fused: bool
    tma: bool
    blocks: Blocks
    rescue: Blocks
    precision: str  # of products of float32: torch's own setting decides, as it does for torch.mm

    @staticmethod
    def of(rows: Rows, here: Entry, keeps: bool) -> Plan:
        operands = [o for o in (rows.policy, rows.reference) if o is not None]
        half = rows.policy.hidden.element_size() == 2
        tma = here.tma and half and all(map(describable, operands))
        limit = here.fused_other_up_to if half else here.fused_full_up_to
        if is_simple(rows):
            limit = here.fused_up_to if keeps else here.fused_score_up_to
        fused = rows.policy.weight is not None and max(o.size for o in operands) <= limit
        rescue = plain = here.plain if half else here.full
        if rows.reference:  # two products of rows that lie anywhere leave registers for small tiles only
            rescue = rescue._replace(BLOCK_V=32) if half else rescue._replace(BLOCK_N=32, BLOCK_V=32)
        mine = here.pair if rows.reference else here.half
        if not keeps and here.score is not None and is_simple(rows):
            mine = here.score
        capped = any(o.softcap is not None for o in operands)  # a tanh takes registers that large tiles do not have
        large = half and tma == here.tma and not capped
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises once this one was set
        precision = "tf32" if tf32 else here.precise
        return Plan(fused, tma, mine if large else plain, rescue, precision)

    def tiles(self, rows: Rows, here: Entry) -> int:
        """Pieces of the vocabulary, each of which leaves its sums."""
        strips = here.fold.width if is_simple(rows) else piece(rows.vocab, here.pieces)
        return -(-rows.vocab // (self.blocks.BLOCK_V if self.fused else strips))


def _rows_of_logits(rows: Rows, dtype: torch.dtype) -> Tensor:
    """[n, V] of a row stride that products and wide stores like."""
    stride = -(-rows.vocab // 64) * 64
    return torch.empty(rows.count, stride, dtype=dtype, device=rows.targets.device)[:, : rows.vocab]


def _statistics(
    rows: Rows, kept: Tensor | None, kept_ref: Tensor | None
) -> tuple[TokenStats, tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    N, K = rows.targets.shape
    policy, ref, device = rows.policy, rows.reference, rows.targets.device
    here = entry(device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    anchor, anchor_ref, flags = new(N), new(N) if ref else None, new(N, dtype=torch.int8)
    own = torch.full((N, K), torch.nan, device=device)  # and NaN it stays where a target is no column
    columns = [new(N) for _ in range(4)]  # entropy, lse, mean_logit, top1
    kl = new(N) if ref else None
    stats = TokenStats(new(N, K), columns[0], columns[1], columns[2], columns[3], kl)
    log_s, log_s_ref = new(N), new(N) if ref else None
    norms = (anchor, log_s, anchor_ref, log_s_ref)
    if N == 0:
        return stats, norms
    anchors(rows, policy, anchor, here.pieces)
    if ref and anchor_ref is not None:
        anchors(rows, ref, anchor_ref, here.pieces)

    planes, plan = PLANES_WITH_REFERENCE if ref else PLANES, Plan.of(rows, here, keeps=kept is not None)
    partials = new(planes, plan.tiles(rows, here), N)
    end = (own, anchor, anchor_ref, flags, tuple(stats), log_s, log_s_ref)
    if plan.fused:
        fold_head(rows, anchor, anchor_ref, None, partials, own, kept, kept_ref, plan.blocks, plan.tma, plan.precision)
    elif policy.weight is None:
        fold_rows(rows, 0, policy.hidden, None, anchor, None, None, partials, own, None, None, here.pieces)
    else:
        _fold_strips(rows, anchor, anchor_ref, partials, own, kept, kept_ref, here)
    finish(rows, partials, *end, rescue=False, simple=is_simple(rows))

    # Rows far from their anchor, once more from their largest logit. Who they are only the device knows.
    if policy.weight is None:
        fold_rows(rows, 0, policy.hidden, None, anchor, None, flags, partials, own, None, None, here.pieces)
    else:
        partials = new(planes, min(RESCUE_PROGRAMS, -(-rows.vocab // plan.rescue.BLOCK_V)), N)
        far = far_rows(flags)
        fold_head(rows, anchor, anchor_ref, far, partials, own, kept, kept_ref, plan.rescue, False, plan.precision)
    finish(rows, partials, *end, rescue=True, simple=False)
    return stats, norms


def _fold_strips(
    rows: Rows, anchor: Tensor, anchor_ref: Tensor | None, partials: Tensor, own: Tensor, kept: Tensor | None,
    kept_ref: Tensor | None, here: Entry,
) -> None:  # fmt: skip
    """The vendor's product a strip at a time. Logits that are kept in float32 are made where they stay."""
    N, V, ref = rows.count, rows.vocab, rows.reference
    width, simple = min(V, here.strip), is_simple(rows)

    def scratch() -> Tensor:
        return torch.empty(N * width, dtype=torch.float32, device=rows.targets.device)

    def strips(operand: Operand) -> tuple[Tensor, ...]:
        assert operand.weight is not None
        return operand.weight.T.split(width, 1)

    def logits(operand: Operand, weight: Tensor, first: int, stays: Tensor | None, memory: Tensor | None) -> Tensor:
        columns = weight.shape[1]
        if memory is None:
            assert stays is not None
            return product(operand.hidden, weight, out=stays[:, first : first + columns])
        return product(operand.hidden, weight, out=memory[: N * columns].view(N, columns))

    direct = kept is not None and kept.dtype == torch.float32
    memory = None if direct else scratch()
    memory_ref = None if kept_ref is not None or ref is None else scratch()
    theirs = strips(ref) if ref else [None] * len(strips(rows.policy))
    for first, weight, other in zip(range(0, V, width), strips(rows.policy), theirs, strict=True):
        z = logits(rows.policy, weight, first, kept, memory)
        z_ref = None if ref is None or other is None else logits(ref, other, first, kept_ref, memory_ref)
        if simple:
            fold_strip(rows, first, z, anchor, partials, own, kept, here.fold)
        else:
            fold_rows(rows, first, z, z_ref, anchor, anchor_ref, None, partials, own, kept, kept_ref, here.pieces)
