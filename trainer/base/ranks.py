"""Several processes on one run, as ``torchrun`` starts them: ranks share the micro-batches of a step, and sampling.

Everything else is the same everywhere: every rank reads the data, scores and steps its own copy of the models, so that
nothing depends on how many there are, and a checkpoint can be resumed on any number. Only the first rank's run folder
is real; the others work in a folder of their own that is gone afterwards. A model has to fit on each device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
R = TypeVar("R")


def count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mine() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local() -> int:
    """Which of those on this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def share(parts: Iterable[T]) -> list[tuple[int, T]]:
    """This rank's micro-batches of a step, with their numbers."""
    return [(i, part) for i, part in enumerate(parts) if i % count() == mine()]


def spread(parts: Iterable[T], work: Callable[[T], R]) -> list[R]:
    """What ``work`` makes of each part, in their order and on every rank; each part is one rank's.

    Args:
        parts: The same on every rank.
        work: Its results can be pickled.

    Raises:
        RuntimeError: It has failed on another rank. On that rank the error is its own, so that nobody waits for it.

    Example:
        >>> spread([2, 3], lambda x: x * x)
        [4, 9]
    """
    if count() == 1:
        return [work(part) for part in parts]
    import torch.distributed as dist

    found: dict[int, R] = {}
    failed = ""
    told: list[Any] = [None] * count()
    try:
        found = {i: work(part) for i, part in share(parts)}
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
        raise
    finally:
        dist.all_gather_object(told, (found, failed))
    for rank, (_, why) in enumerate(told):
        if why:
            raise RuntimeError(f"rank {rank} has failed: {why}")
    results = {i: result for one, _ in told for i, result in one.items()}
    return [results[i] for i in range(len(results))]


def total(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name, summed over ranks in their order; a name that one rank does not know counts zero there."""
    if count() == 1:
        return found
    import torch.distributed as dist

    told: list[Any] = [None] * count()
    dist.all_gather_object(told, found)
    names = dict.fromkeys(name for one in told for name in one)
    return {name: sum(one.get(name, 0.0) for one in told) for name in names}


def from_first(found: T) -> T:
    """What the first rank has found, lest a coin fall differently on another device."""
    if count() == 1:
        return found
    import torch.distributed as dist

    told = [found]
    dist.broadcast_object_list(told)
    return told[0]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every parameter's gradient, summed over ranks; where nobody has one it stays away."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    parameters = list(parameters)
    device = parameters[0].device
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    for p, somewhere in zip(parameters, there.tolist(), strict=True):
        if somewhere:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
