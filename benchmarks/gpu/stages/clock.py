"""Time, memory and host work of a step on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import memory

Step = Callable[[], Any]
LEAST = 3  # rounds, however little time is left


def once(step: Step) -> float:
    """Milliseconds of one call by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turns(steps: dict[str, Step], rounds: int, left: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each step, A B C, A B C, ...; fewer rounds where time is out, but three if so many are wanted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(rounds):
        if done >= LEAST and left() <= 0:
            break
        for name, step in steps.items():
            times[name].append(once(step))
    return times


def peak(step: Step) -> float:
    """Megabytes that one call needs beyond what was there before it."""
    return memory.peak(step, cuda=True)[0] / 1e6


class _Operations(TorchDispatchMode):
    """Counts what torch dispatches, views and metadata too, in backward as well."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def counts(step: Step) -> dict[str, int]:
    """Kernel launches, waits of the host and dispatched torch operations, of one call each."""
    with _Operations() as operations:
        step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(x.message) for x in said)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or ()]
    launches = sum("LaunchKernel" in name or "LaunchCooperativeKernel" in name for name in names)
    return {"launches": launches, "host_waits": waits, "operations": operations.count}
