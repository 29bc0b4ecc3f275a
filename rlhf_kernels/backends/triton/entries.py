"""The few entries of the gradients of logits that a tolerance leaves, and their products.

Three passes over what the forward kept, none of which writes logits: how much lies below each rung of a ladder of
sizes; how many entries lie above the rung that a row may lose; where they are.

Legend: R rows that are looked at, V vocabulary, T pieces of columns, E entries.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.sparse import Share
from rlhf_kernels.backends.triton.gradient import UNALIGNED, Calculus, logit_gradients
from rlhf_kernels.backends.triton.rows import piece
from rlhf_kernels.backends.triton.table import Pieces
from rlhf_kernels.types import Entries, Sinks, Tile

LEVELS = 16  # rungs, each half the one above; the first is what a row may lose in a single entry
BYTES = 44  # of an entry while it is sorted
GATHERED, WIDTH = 32, 256  # a program takes 256 columns of 16 rows of halves, or 8 of float32, at a time


class Kept(NamedTuple):
    """Entries row by row, columns ascending."""

    columns: Tensor  # [E] int32
    values: Tensor  # [E] float32
    owners: Tensor  # [E] int32, which of the rows
    starts: Tensor  # [rows + 1] int64

    @staticmethod
    def room(size: int, starts: Tensor) -> Kept:
        """For this many entries, zero until they are found."""

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=starts.device)

        return Kept(zeros(torch.int32), zeros(torch.float32), zeros(torch.int32), starts)


def few(vocab: int, half: bool) -> int:
    """Entries of a row beyond which the products with everything are faster: those of halves by far."""
    return min(vocab // 2, max(128, vocab // (256 if half else 64)))


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=[*UNALIGNED, "index"])
def entries_kernel(
    kept, kept_ref, bias, anchor, log_s, anchor_ref, log_s_ref, entropy, kl, targets, temperature,
    g_logp, g_entropy, g_lse, g_mean, g_kl, V, ld_kept, ld_ref, scale, softcap, per_t,
    index, root, floor, sums, counts, starts, columns_out, values_out, owners_out, R,
    K: tl.constexpr, EXP: tl.constexpr, RAW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    PER_TOKEN: tl.constexpr, HAS_REF: tl.constexpr, FORWARD_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One piece of a few of the rows ``index``. STEP 0: sums [LEVELS + 1, T, R] of squares relative to ``root``, below
    each rung and of all. 1: ``counts`` [T, R] of entries that reach ``floor``. 2: the entries themselves, from
    ``starts`` [T, R] on.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64)
    in_n = i < R
    row = tl.load(index + i, mask=in_n, other=0)[:, None]
    columns = first * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_v = columns < V
    inside = in_n[:, None] & in_v
    g = logit_gradients(
        kept, kept_ref, bias, anchor, log_s, anchor_ref, log_s_ref, entropy, kl, targets, temperature,
        g_logp, g_entropy, g_lse, g_mean, g_kl, V, ld_kept, ld_ref, scale, softcap, per_t,
        row, columns, in_n[:, None], in_v,
        K, EXP, RAW, HAS_BIAS, HAS_CAP, PER_TOKEN, HAS_REF, FORWARD_KL, HAS_ENTROPY, HAS_LSE, HAS_MEAN,
    )  # fmt: skip
    here = first * R + i
    if STEP == 0:
        x = tl.where(inside, tl.abs(g) / tl.load(root), 0.0)
        plane = tl.num_programs(1).to(tl.int64) * R
        for level in tl.static_range(LEVELS):
            below = tl.where(x < 1.0 / (1 << level), x * x, 0.0)
            tl.store(sums + level * plane + here, tl.sum(below, 1), mask=in_n)
        tl.store(sums + LEVELS * plane + here, tl.sum(x * x, 1), mask=in_n)
    else:
        large = (inside & ~(tl.abs(g) < tl.load(floor + i, mask=in_n, other=0.0)[:, None])).to(tl.int32)
        if STEP == 1:
            tl.store(counts + here, tl.sum(large, 1), mask=in_n)
        else:
            place = tl.cumsum(large, 1) - 1
            # another compilation of the same line might round otherwise, and must not write where others do
            fits = (large > 0) & (place < tl.load(counts + here, mask=in_n, other=0)[:, None])
            to = tl.load(starts + here, mask=in_n, other=0)[:, None] + place
            tl.store(columns_out + to, tl.broadcast_to(columns, (ROWS, BLOCK)).to(tl.int32), mask=fits)
            tl.store(values_out + to, g, mask=fits)
            tl.store(owners_out + to, tl.broadcast_to(i[:, None], (ROWS, BLOCK)).to(tl.int32), mask=fits)


def launch(
    step: int, given: Calculus, vocab: int, pieces: Pieces, index: Tensor, root: Tensor, *between: Tensor | None
) -> None:
    """One of the three passes; ``between`` is floor, sums, counts, starts, columns, values and owners."""
    block = piece(vocab, pieces)
    entries_kernel[(triton.cdiv(index.numel(), pieces.rows), triton.cdiv(vocab, block))](
        *given.tensors, index, root, *between, index.numel(), **given.options,
        ROWS=pieces.rows, BLOCK=block, LEVELS=LEVELS, STEP=step, num_warps=pieces.num_warps,
    )  # fmt: skip


def select(given: Calculus, part: Share, vocab: int, half: bool, pieces: Pieces) -> Entries:
    """What reaches the highest rung that each row can afford. Waits for the device."""
    device, index = part.look.device, part.look
    R, T = index.numel(), triton.cdiv(vocab, piece(vocab, pieces))
    if not R:
        return Entries(index, part.flat, part.lost, part.norm, None)
    sums = torch.empty(LEVELS + 1, T, R, device=device)
    counts = torch.empty(T, R, dtype=torch.int32, device=device)
    root = part.allowed.sqrt().float()
    launch(0, given, vocab, pieces, index, root, None, sums, *[None] * 5)
    energy = sums.sum(1, dtype=torch.float64)
    fits = energy[:-1] <= 1
    level = fits.int().argmax(0)
    fine = fits.any(0) & energy[-1].isfinite()
    # a hair below the rung: what its own pass, which divides, has counted as lost must be all that is
    floor = root * torch.exp2(-level.float()) * (1 - 1e-6)
    launch(1, given, vocab, pieces, index, root, floor, None, counts, *[None] * 4)
    total = counts.sum(0)
    chosen = fine & (total <= few(vocab, half))
    lost = energy.gather(0, level[None])[0].where(chosen, 0.0) * part.allowed
    mine, kept = chosen.nonzero().squeeze(1), None
    if mine.numel():
        starts = torch.nn.functional.pad(total[mine].cumsum(0), (1, 0))
        counts = counts[:, mine].contiguous()
        before = (counts.cumsum(0) - counts + starts[:-1]).contiguous()
        kept = Kept.room(int(starts[-1]), starts)
        launch(2, given, vocab, pieces, index[mine], root, floor[mine], None, counts, before, *kept[:3])
    entries = Entries(index[mine], index[~chosen], lost, energy[-1] * part.allowed, kept)
    return entries.with_unseen(part.flat, part.lost, part.norm)


@triton.jit(do_not_specialize_on_alignment=["values", "where", "starts"])
def gather_kernel(
    values, where, starts, source, out, W, ld_source, ld_out,
    BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[i] = sum of values[k] source[where[k]] over starts[i] <= k < starts[i + 1], in order; ADD: on top."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = at < W
    begin, end = tl.load(starts + i), tl.load(starts + i + 1)
    if ADD:  # noqa: SIM102  what is known beforehand must not meet what is not
        if begin == end:
            return
    total = tl.zeros((BLOCK_W,), tl.float32)
    for first in tl.range(begin, end, BLOCK_E):
        k = first + tl.arange(0, BLOCK_E)
        there = k < end
        row = tl.load(where + k, mask=there, other=0).to(tl.int64)
        x = tl.load(source + row[:, None] * ld_source + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tl.load(values + k, mask=there, other=0.0)[:, None] * x.to(tl.float32), 0)
    to = out + i * ld_out + at
    if ADD:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def _gather(values: Tensor, where: Tensor, starts: Tensor, source: Tensor, out: Tensor, fresh: bool) -> None:
    """Launch; rows of ``source`` and ``out`` are contiguous."""
    width = out.shape[1]
    block = min(WIDTH, triton.next_power_of_2(width))
    gather_kernel[(out.shape[0], triton.cdiv(width, block))](
        values, where, starts, source, out, width, source.stride(0), out.stride(0),
        BLOCK_E=GATHERED // source.element_size(), BLOCK_W=block, ADD=not fresh, num_warps=4, num_stages=1,
    )  # fmt: skip


def multiply(tile: Tile, entries: Entries, sinks: Sinks) -> None:
    """The products with weight and hidden states, entry by entry, in a fixed order."""
    weight, kept = tile.head.weight, entries.kept
    assert weight is not None
    assert isinstance(kept, Kept)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    hidden = tile.hidden if tile.hidden.stride(1) == 1 else tile.hidden.contiguous()
    if sinks.hidden is not None:
        _gather(kept.values, kept.columns, kept.starts, weight, sinks.hidden, True)
    if sinks.weight is None and sinks.bias is None:
        return
    columns, order = kept.columns.sort(stable=True)
    values = kept.values[order]
    every = torch.arange(weight.shape[0] + 1, dtype=torch.int32, device=columns.device)
    starts = torch.searchsorted(columns, every)
    if sinks.weight is not None:
        whole = sinks.weight if sinks.weight.stride(1) == 1 else sinks.weight.contiguous()
        _gather(values, entries.rows[kept.owners[order].long()], starts, hidden, whole, sinks.fresh)
        if whole is not sinks.weight:
            sinks.weight.copy_(whole)
    if sinks.bias is not None:
        one = torch.ones(1, 1, device=values.device)
        _gather(values, torch.zeros_like(order), starts, one, sinks.bias[:, None], sinks.fresh)
