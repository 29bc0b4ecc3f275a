"""One process at a time trains in a run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in the same folder, where the system can.

    Raises:
        ValueError: One does already.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: another process is training in {folder}; wait for it, or take another --out"
            ) from None
        except OSError:
            pass  # Some network file systems have no locks.
        yield
    finally:
        os.close(descriptor)
