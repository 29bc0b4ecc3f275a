"""Files that are written whole or not at all, and errors of the disk that name their file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT = ".saving"  # This stands behind the name of a file that is not whole yet.


def write_whole(path: Path, contents: bytes) -> Path:
    """Writes all of a file or nothing.

    Raises:
        OSError: The disk is full, or worse; the message names the file, which is still as it was.
    """
    draft = path.with_name(path.name + DRAFT)
    draft.unlink(missing_ok=True)  # In a folder that came from others it may be a link to elsewhere.
    with told(path), draft.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return path


@contextmanager
def told(path: Path) -> Iterator[None]:
    """A full disk names no file, so this does."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"{path.name} could not be written: {why}", str(path)) from error
