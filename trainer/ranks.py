"""Several processes on one run, as ``torchrun`` starts them: ranks share the micro-batches of a step, and sampling.

Everything else is the same everywhere: every rank reads the data, scores and steps its own copy of the models, so that
nothing depends on how many there are, and a checkpoint can be resumed on any number. Only the first rank's run folder
is real; the others work in a folder of their own that is gone afterwards. A model has to fit on each device.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.checkpoint import CHECKPOINTS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(hours=2)  # for one another: a rollout may take long on one of them
OWN = "rlhf-train-rank-"  # Folders of ranks after the first are called so.
YOUNG = 60.0  # For so many seconds such a folder may not be locked yet.


def count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mine() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local() -> int:
    """Which of those on this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def placed(config: T, *, resume: bool = False) -> T:
    """The configuration of a run as this rank follows it; meets the others.

    Args:
        config: With the run folder in ``out``.
        resume: Other ranks start from what is there.
    """
    _sweep()
    if count() == 1:
        return config
    import torch
    import torch.distributed as dist

    cuda = getattr(config, "device", "cpu") != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    if mine() > 0:
        folder = _own_folder()
        if resume:
            _look_into(Path(config.out), folder)  # type: ignore[attr-defined]
        config = dataclasses.replace(config, out=folder, quiet=True)  # type: ignore[type-var]
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one voice is enough, to the end of the process
    dist.barrier()  # nobody changes the folder before all have seen it
    return config


def _own_folder() -> Path:
    """A run folder that is gone when this process is; if it is killed, the next start clears it away."""
    home = Path(tempfile.mkdtemp(prefix=OWN))
    _locked(home)  # The system holds the lock for as long as this process lives.
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "run").mkdir()
    return home / "run"


def _look_into(run: Path, folder: Path) -> None:
    """Logs are copied, for they are cut and written on; checkpoints are only read, and may be large."""
    for file in run.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    if (run / CHECKPOINTS).is_dir():
        (folder / CHECKPOINTS).symlink_to((run / CHECKPOINTS).absolute(), target_is_directory=True)


def _sweep() -> None:
    """Removes what killed ranks of this user have left. A folder whose lock is free has nobody any more."""
    if fcntl is None:
        return
    for home in Path(tempfile.gettempdir()).glob(OWN + "*"):
        if home.is_symlink() or not re.fullmatch(OWN + r"[a-z0-9_]{8}", home.name):
            continue
        try:
            about = home.stat()
        except OSError:  # Its owner was faster.
            continue
        old = time.time() - about.st_mtime > YOUNG
        if old and about.st_uid == os.getuid() and (descriptor := _locked(home)) is not None:
            shutil.rmtree(home, ignore_errors=True)
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None if another does, or there are no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
