"""The fingerprint of a data file."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from trainer.data.lines import existing

SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time tells it from an earlier file of the same size."""
_known: dict[tuple[int, int, int, int] | None, str] = {}


def sha256(path: str | Path) -> str:
    """Hex digest of the file as it lies on disk; it names the data in a run folder.

    A large file is read once per process, unless its size or its time changes.

    Args:
        path: Any file.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder.
    """
    path = existing(Path(path))
    about, now = path.stat(), time.time_ns()
    # A file that was changed just now may be changed once more without a newer time.
    changed = max(about.st_mtime_ns, about.st_ctime_ns)
    key = (about.st_dev, about.st_ino, about.st_size, changed) if now - changed > SETTLED else None
    if key not in _known:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if key is None:
            return digest
        _known[key] = digest
    return _known[key]
