"""Several processes of one function, over gloo: what one of them raises is raised, and a hang ends after a minute."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60


def _enter(rank: int, ranks: int, meet: str, work: Callable[..., Any], given: tuple, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meet}/met", rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS)
    )
    try:
        answers.put((rank, pickle.dumps(work(rank, *given))))  # by value: shared memory would end with this process
    finally:
        dist.destroy_process_group()


def on_ranks(ranks: int, work: Callable[..., Any], *given: Any, seconds: float = SECONDS) -> list[Any]:
    """What ``work(rank, *given)`` returns on each rank; ``work`` must be importable.

    Raises:
        TimeoutError: they have not finished within a minute.
        torch.multiprocessing.ProcessRaisedException: one of them failed.
    """
    answers = mp.get_context("spawn").SimpleQueue()
    told: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as meet:
        found = mp.start_processes(_enter, (ranks, meet, work, given, answers), ranks, join=False, start_method="spawn")
        try:
            for _ in range(int(10 * seconds)):
                done = found.join(timeout=0.1)
                while not answers.empty():
                    told.__setitem__(*answers.get())
                if done:
                    break
            else:
                raise TimeoutError(f"{ranks} ranks have not finished within {seconds} s; {sorted(told)} have answered")
        finally:
            for process in found.processes:
                process.kill()
    return [pickle.loads(told[rank]) for rank in range(ranks)]
