"""Peak memory of a step: resident on a CPU (Linux), allocated on a GPU, or counted.

Resident memory is what a machine must have. It is right in a process that has done nothing else: see ``elsewhere``.
Counted memory is what torch's operators hand out, the same number in every run. It contains neither what an operator
needs inside nor the packed strips in csrc, which come to a few KiB per row.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contenders.base import brief
from benchmarks.work.truth import Result

Step = Callable[[], Any]
T = TypeVar("T")
LONGEST = 600.0  # seconds that a process may take
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # These are numbers of mallopt's parameters.
RETURNED = 64 * 1024  # bytes; a block of as many is given back as soon as it is freed


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def give_back() -> None:
    """From here on glibc gives blocks back as they are freed, so that resident memory is memory in use."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, RETURNED)  # Left alone, this threshold would grow.
    libc.mallopt(TRIM_THRESHOLD, RETURNED)


def forget_the_past() -> None:
    """Give freed memory back and reset the high-water mark, so that what came before does not count."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak(step: Step, *, cuda: bool = False) -> tuple[int, Any]:
    """Bytes that one call needs beyond what was there before it, and what it returned."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    forget_the_past()
    before = resident("VmRSS")
    result = step()
    return resident("VmHWM") - before, result


def extra(step: Step, *, cuda: bool = False) -> int:
    """Bytes beyond what was there and the gradients that are handed back; beyond all that is, where there are none."""
    most, result = peak(step, cuda=cuda)
    if isinstance(result, Result):
        result = result.grad_hidden, result.grad_weight, result.grad_logits
    return most - sum(x.nbytes for x in result or () if isinstance(x, Tensor))


def elsewhere(
    function: Callable[..., T], *arguments: Any, seconds: float = LONGEST, preload: Sequence[str] | None = None
) -> T:
    """What a function returns in a process that has done nothing before.

    Args:
        function: Of a module; like its arguments and its result it is pickled.
        arguments: Of the function.
        seconds: After so many the process is killed.
        preload: Modules that take long to import. The process is forked from one that has imported them, which is the
            same for all calls, and its resident memory at the start is not that of a program. None starts a program.

    Raises:
        RuntimeError: The other process failed, died or took too long.
    """
    context = multiprocessing.get_context("spawn" if preload is None else "forkserver")
    if preload is not None:
        context.set_forkserver_preload([__name__, *preload])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result(seconds)
        except BrokenProcessPool as error:
            raise RuntimeError("its process was killed: not enough memory?") from error
        except Exception as error:
            for process in (pool._processes or {}).values():
                process.kill()  # It is ours, and perhaps still busy.
            raise RuntimeError(brief(error)) from error


class Allocations(TorchDispatchMode):
    """Counts what torch's operators hand out, as a context manager; in autograd's backward as well.

    ``largest`` counts elements, ``largest_from`` names the operator. ``peak`` is the most bytes that were alive at once
    of storages made meanwhile; what was there before does not count. Memory that the native backend has kept for its
    next call is given up on entry: it would hide what that call needs, and show how large an earlier one was.

    Example:
        >>> with Allocations() as seen:
        ...     x = torch.ones(3, 5)
        ...     x = (x + x).sum()
        >>> seen.largest, seen.peak, seen.live
        (15, 124, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.largest_from = 0, ""
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> Allocations:
        gc.collect()
        native = sys.modules.get("rlhf_kernels.backends.native")
        if native is not None:
            native._offered.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor | UntypedStorage):
                self._book(x, new=False)  # older than this context, or booked before
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._book(x, new=True)
                if x.numel() > self.largest:
                    self.largest, self.largest_from = x.numel(), str(func)
        return out

    def _book(self, x: Tensor | UntypedStorage, *, new: bool) -> None:
        storage = x.untyped_storage() if isinstance(x, Tensor) else x
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
