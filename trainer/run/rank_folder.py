"""Where the processes of one run write: the first in the run folder, each other in a folder of its own.

Those are gone afterwards; what a killed process has left, the next start clears away.
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
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from trainer.base.ranks import count, local, mine
from trainer.run.checkpoint import CHECKPOINTS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for one another: a rollout may take long on one of them
OWN = "rlhf-train-rank-"  # Folders of ranks after the first are called so.
YOUNG = 60.0  # For so many seconds such a folder may not be locked yet.


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
