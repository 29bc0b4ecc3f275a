"""Peak memory of one step beyond its inputs and gradients, in a process of its own (Linux).

Resident memory is what a machine must have. A process that has run nothing else shows it; processes are forked from one
that has imported everybody, since importing takes longer than measuring.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks.cases import SHAPES, Batch, draw, for_op
from benchmarks.contenders import contenders

SEVERAL_SECONDS_TO_IMPORT = ("trl.kernels.chunked_divergence", "liger_kernel.chunked_loss", "liger_kernel.transformers")
LONGEST = 600  # seconds


def _kilobytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def forget_the_past() -> None:
    """Give freed memory back and reset the high-water mark, so that making the inputs does not count.

    From here on large blocks are given back as they are freed: what is counted was alive at once, and is not what
    malloc happened to keep.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD, which otherwise grows
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def _extra_bytes(path: str, op: str, name: str, threads: int, max_bytes: int | None) -> int:
    torch.set_num_threads(threads)
    batch = Batch.load(path)
    contender = next(c for c in contenders(op, max_bytes) if c.name == name)
    warm = batch if contender.compiles else for_op(op, *draw(SHAPES["tiny"], batch.hidden.dtype))[0]
    contender.build(warm)()
    step = contender.build(batch)
    forget_the_past()
    before = _kilobytes("VmRSS")
    result = step()
    gradients = [g for g in (result.grad_hidden, result.grad_weight, result.grad_logits) if g is not None]
    return (_kilobytes("VmHWM") - before) * 1024 - sum(g.numel() * g.element_size() for g in gradients)


def extra_bytes(path: str, op: str, name: str, threads: int, max_bytes: int | None = None) -> int:
    """Run ``name`` once on a saved batch elsewhere; what it needed beyond inputs and gradients, in bytes.

    Raises:
        RuntimeError: the other process failed, died or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SEVERAL_SECONDS_TO_IMPORT])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_extra_bytes, path, op, name, threads, max_bytes).result(LONGEST)
        except BrokenProcessPool as error:
            raise RuntimeError("its process was killed: not enough memory?") from error
        except Exception as error:
            raise RuntimeError(str(error) or type(error).__name__) from error
