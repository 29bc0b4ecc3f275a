"""A contender's peak memory beyond its inputs and gradients, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.contenders.roster import contenders
from benchmarks.measure import memory
from benchmarks.work.cases import SHAPES, Batch, draw, for_op

SEVERAL_SECONDS_TO_IMPORT = ("trl.kernels.chunked_divergence", "liger_kernel.chunked_loss", "liger_kernel.transformers")


def _extra_bytes(batch_of: Callable[[], Batch], op: str, name: str, threads: int, max_bytes: int | None) -> int:
    torch.set_num_threads(threads)
    batch = batch_of()
    contender = next(c for c in contenders(op, max_bytes) if c.name == name)
    warm = batch if contender.compiles else for_op(op, *draw(SHAPES["tiny"], batch.hidden.dtype))[0]
    contender.build(warm)()
    step = contender.build(batch)
    memory.give_back()
    return memory.extra(step)


def extra_bytes(
    batch_of: Callable[[], Batch], op: str, name: str, threads: int, max_bytes: int | None = None,
    seconds: float = memory.LONGEST,
) -> int:  # fmt: skip
    """Of one step of this contender on a CPU.

    Args:
        batch_of: Makes the batch there, and can be pickled.
        op: What is computed.
        name: Of the contender.
        threads: Of torch.
        max_bytes: Our byte budget; None is the library's.
        seconds: After so many the process is killed.

    Raises:
        RuntimeError: The other process failed, died or took too long.
    """
    given = (batch_of, op, name, threads, max_bytes)
    return memory.elsewhere(_extra_bytes, *given, seconds=seconds, preload=(__name__, *SEVERAL_SECONDS_TO_IMPORT))
