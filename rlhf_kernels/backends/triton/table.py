"""Which tiles run where, and which way through the head is taken: made offline, never tuned at run time.

Every entry says what stands behind it. ``None`` for a measurement means that nobody has run it on that chip yet: the
choice then follows the roofline (a fused epilogue saves memory traffic, which counts where H is small; a vendor's
product is nearer to the peak, which counts where H is large), and the compile tests prove that it fits the chip.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """Sizes of a tile along rows, vocabulary and hidden, and how it is run."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int


class Pieces(NamedTuple):
    """What one program of the passes over logits in memory takes."""

    rows: int
    columns: int
    num_warps: int


class Fold(NamedTuple):
    """What one program of the fold over a strip of a simple head takes: ``steps`` times ``columns`` of a few rows."""

    rows: int
    columns: int
    steps: int
    num_warps: int

    @property
    def width(self) -> int:
        return self.columns * self.steps


class Entry(NamedTuple):
    """One architecture."""

    half: Blocks  # bfloat16 and float16, by tensor descriptors where ``tma``
    pair: Blocks  # policy and reference in one tile, as half
    plain: Blocks  # halves that no descriptor can read, and rows that are folded once more
    full: Blocks  # float32
    pieces: Pieces
    tma: bool
    fused_up_to: int  # largest hidden size of a simple head whose statistics are fused with the product
    strip: int  # columns of logits in float32 that exist at a time beyond it, a multiple of the pieces' and the fold's
    precise: str  # how Triton multiplies float32 so that float32 comes out
    measured: str | None  # the file of results behind the entry
    fused_full_up_to: int = 0  # as ``fused_up_to``, for float32
    fused_other_up_to: int = 0  # and for halves that are not simple
    score: Blocks | None = None  # as ``half``, where nothing is kept and the head is simple; None: as ``half``
    fused_score_up_to: int = 0  # as ``fused_up_to``, where nothing is kept
    fold: Fold = Fold(1, 512, 8, 2)

    def by(self, way: str) -> Entry:
        """The same, every head going one way: "fused" or "strips"."""
        limit = {"fused": ANY, "strips": 0}[way]
        return self._replace(
            fused_up_to=limit, fused_full_up_to=limit, fused_other_up_to=limit, fused_score_up_to=limit
        )


ANY = 1 << 20  # hidden size
FULL, FULL_90 = Blocks(64, 64, 16, 8, 2), Blocks(64, 64, 16, 8, 1)
PIECES = Pieces(1, 2048, 4)
PLAIN = Blocks(64, 64, 32, 8, 3)
FULL_100 = Blocks(64, 32, 16, 4, 2)
PLAIN_100 = Blocks(64, 64, 32, 4, 2)
# for the interpreter, where every operation costs the same whatever its size
SMALL, SMALL_PIECES, SMALL_FOLD = Blocks(32, 128, 16, 4, 1), Pieces(32, 128, 4), Fold(32, 64, 2, 4)

# Triton 3.6 turns an "ieee" product of float32 into one of tf32 on tensor cores of 10.x, in silence; three of them do.
BY_CAPABILITY = {
    (8, 0): Entry(
        Blocks(64, 128, 32, 8, 3), Blocks(64, 64, 32, 8, 3), PLAIN, FULL, PIECES, False, 0, 8192, "ieee", None
    ),
    # Scoring: fused wins at both sizes that were measured. Training: fused wins at 896, neither at 4096.
    (9, 0): Entry(
        half=Blocks(128, 128, 64, 8, 4), pair=Blocks(128, 64, 64, 8, 3), plain=PLAIN, full=FULL_90, pieces=PIECES,
        score=Blocks(128, 256, 64, 8, 3), tma=True, precise="ieee", measured="gpu-h200.json",
        fused_up_to=1536, fused_score_up_to=ANY, fused_other_up_to=1536, strip=8192,
    ),
    (10, 0): Entry(
        half=Blocks(128, 64, 64, 8, 4), pair=Blocks(128, 64, 64, 8, 3), plain=PLAIN_100, full=FULL_100, pieces=PIECES,
        tma=True, precise="tf32x3", measured=None,
        fused_up_to=1536, fused_score_up_to=1536, fused_other_up_to=1536, strip=8192,
    ),
}  # fmt: skip
CONSERVATIVE = Entry(PLAIN, PLAIN, PLAIN, FULL, PIECES, False, 0, 8192, "ieee", None)
INTERPRETED = Entry(SMALL, SMALL, SMALL, SMALL, SMALL_PIECES, False, 0, 256, "ieee", None, fold=SMALL_FOLD)


@functools.cache
def _unlisted(capability: tuple[int, int]) -> Entry:
    known = ", ".join(f"{a}.{b}" for a, b in sorted(BY_CAPABILITY))
    alike = capability[0] in (10, 11)  # the tensor cores of 10.0, and their "ieee" too
    warnings.warn(
        f"rlhf_kernels: no tuning for compute capability {capability[0]}.{capability[1]} (there is for {known}); "
        f"{'that of 10.0' if alike else 'a conservative entry'} runs",
        stacklevel=2,
    )
    return BY_CAPABILITY[(10, 0)] if alike else CONSERVATIVE


def entry(device: torch.device) -> Entry:
    """The entry of a device."""
    if device.type != "cuda":
        return INTERPRETED
    capability = torch.cuda.get_device_capability(device)
    return BY_CAPABILITY.get(capability) or _unlisted(capability)
