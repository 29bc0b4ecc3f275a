"""torch.cuda on a machine without a GPU, for a dry run: the same lines run, on the CPU, and kernels are interpreted.

Nothing here makes up a result: times of a dry run are those of the interpreter, and its file says that it was one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

CAPABILITY = (9, 0)
NAME = "no GPU: a dry run"
MEMORY = 80 * 10**9


class Event:
    """Takes the time of the host, which is the device."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3

    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True


class Stream:
    """The only one there is, whatever it is called."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Graph:
    """What is captured runs once, at the capture."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def replay(self) -> None: ...
    def reset(self) -> None: ...


def _gives(value: Any) -> Any:
    """A function of its own: torch.compile keeps a book of them."""
    return lambda *_, **__: value


def _context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _functions() -> dict[str, Any]:
    properties = SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=4,
        L2_cache_size=2**25, max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    fixed: dict[str, Any] = {
        "is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY, "get_device_properties": properties, "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "memory_stats": {}, "get_sync_debug_mode": 0, "is_current_stream_capturing": False, "get_rng_state_all": [],
    }  # fmt: skip
    found = {name: _gives(value) for name, value in fixed.items()}
    quiet = (
        "synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode", "set_device", "ipc_collect",
        "set_rng_state_all", "init", "manual_seed", "manual_seed_all",
    )  # fmt: skip
    found |= {name: _gives(None) for name in quiet}
    found |= {name: lambda *_, **__: contextlib.nullcontext() for name in ("graph", "stream", "device")}
    return found | {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "default_stream": Stream,
    }


@contextlib.contextmanager
def faked() -> Iterator[None]:
    """In the block torch.cuda has a GPU of ``CAPABILITY``, and Triton's interpreter its corrections."""
    from tests.gpu.interpret import shim

    shim.install()
    with mock.patch.multiple(torch.cuda, **_functions()), mock.patch.object(torch.cuda.nvtx, "range", _context):
        yield
