"""Counts what torch's operators hand out: the largest tensor, and the most bytes alive at once.

Unlike resident memory this is the same number in every run. It sees neither what an operator needs inside nor the
packed strips in csrc, which come to a few KiB per row.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Active as a context manager, in autograd's backward as well.

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
