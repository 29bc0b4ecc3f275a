"""Checkpoints that a crash cannot spoil: safetensors and JSON, written aside, synced, checksummed, renamed.

A save goes ``step-0000120.saving/`` (every file synced, a manifest of sha256 sums last), then the folder's new name,
then the pointer ``latest.json``. Whatever moment a machine dies at, the pointer names a folder that is whole. No pickle
is written, and nothing but safetensors and JSON is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.run.durable import write_json, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = "checkpoints"
POINTER, MANIFEST, STATE = "latest.json", "manifest.json", "state.json"
ASIDE, GONE, FORMAT = ".saving", ".removed", 1
NAME = re.compile(r"step-\d{7}(\.\d{5})?")
SUFFIXES = (".json", ".safetensors")


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


class Checkpoint:
    """One checkpoint, its checksums verified.

    Args:
        path: Its folder.

    Raises:
        Damaged: Says what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _verify(path)
        self.state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``name.safetensors``, on the host; empty if there were none to save."""
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.exists() else {}


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: The run folder; checkpoints lie in ``checkpoints/`` in it, which may be a link to another disk. What else
            lies there is nobody's business here.
        keep_last: How many stay.
    """

    def __init__(self, run: Path | str, keep_last: int = 2) -> None:
        self.folder, self.keep_last = Path(run) / CHECKPOINTS, keep_last

    def names(self) -> list[str]:
        """Complete folders, oldest first."""
        return [name for name in self._ours() if not name.endswith((ASIDE, GONE))]

    def latest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """The newest good one: that of the pointer, or else the newest whose checksums hold.

        Args:
            note: Receives one line for every checkpoint that is passed over.

        Raises:
            ValueError: There are checkpoints, and all of them are damaged.
        """
        names = self.names()[::-1]
        pointed = self._pointed()
        if pointed is not None:
            names = [pointed, *(n for n in names if n != pointed)]
        for name in names:
            try:
                return Checkpoint(self.folder / name)
            except Damaged as reason:
                note(f"checkpoint {name} is passed over: {reason}")
        if names:
            raise ValueError(f"{self.folder}: none of its checkpoints is usable; start again with --overwrite")
        return None

    def save(self, name: str, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes one checkpoint; older ones go only after it is safe on the disk.

        Args:
            name: Of its folder. Names sort by age.
            state: What JSON can hold.
            tensors: Files, without their suffix, and what they hold.

        Raises:
            OSError: The disk is full, or worse. What was there before is still there.
        """
        Path(os.path.realpath(self.folder)).mkdir(parents=True, exist_ok=True)
        aside, place = self.folder / (name + ASIDE), self.folder / name
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            files = {STATE: write_json(aside / STATE, state)}
            for file, contents in tensors.items():
                if contents:
                    files[f"{file}.safetensors"] = write_safetensors(aside / f"{file}.safetensors", contents)
            write_json(aside / MANIFEST, {"format": FORMAT, "files": files})
            _sync_folder(aside)
            _remove(place)  # left by a crash before the pointer moved, or damaged
            aside.rename(place)
            _sync_folder(self.folder)
            self._point(name)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._forget(name)

    def clear(self) -> None:
        """Removes them all, the newest first, and the folder unless it holds something else."""
        for name in (POINTER, POINTER + ASIDE):
            (self.folder / name).unlink(missing_ok=True)
        for name in self._ours()[::-1]:
            _remove(self.folder / name)
        with suppress(OSError):
            self.folder.rmdir()  # A link is no folder, so it stays.

    def begun(self) -> bool:
        """Whether there is anything that ``clear`` would remove."""
        return bool(self._ours()) or (self.folder / POINTER).exists()

    def others(self) -> bool:
        """Whether something has a name of ours, and is none of ours: a checkpoint without a manifest, or a pointer."""
        strange = not self.folder.is_dir() and self.folder.exists()
        for name in self.names():
            strange |= not (self.folder / name / MANIFEST).is_file()
        return strange or ((self.folder / POINTER).exists() and not NAME.fullmatch(self._told() or ""))

    def _ours(self) -> list[str]:
        """Folders that a run has made, leftovers of a crash among them; whatever else lies there is of others."""
        folders = [p for p in self.folder.iterdir() if p.is_dir()] if self.folder.is_dir() else []
        return sorted(p.name for p in folders if _is_ours(p))

    def _pointed(self) -> str | None:
        name = self._told()
        return name if name in self.names() else None

    def _told(self) -> str | None:
        """What the pointer says."""
        try:
            name = json.loads((self.folder / POINTER).read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return name if isinstance(name, str) else None

    def _point(self, name: str) -> None:
        draft = self.folder / (POINTER + ASIDE)
        draft.unlink(missing_ok=True)  # In a folder that came from others it may be a link to elsewhere.
        write_json(draft, {"checkpoint": name})
        draft.replace(self.folder / POINTER)
        _sync_folder(self.folder)

    def _forget(self, newest: str) -> None:
        """Keeps ``newest`` and its predecessors; whatever lies beyond it is a future that did not come."""
        kept = [n for n in self.names() if n <= newest][-self.keep_last :]
        for name in self._ours():
            if name not in kept:
                _remove(self.folder / name)


def _is_ours(path: Path) -> bool:
    """A folder with a checkpoint's name, or its manifest."""
    if NAME.fullmatch(path.name.removesuffix(ASIDE).removesuffix(GONE)):
        return True
    with suppress(Damaged, OSError):
        return bool(_listed(path))
    return False


def _remove(path: Path) -> None:
    """Takes the name away first, so that whoever is killed meanwhile leaves nothing that looks like a checkpoint."""
    gone = path if path.suffix == GONE else path.with_name(path.name + GONE)
    if path.exists() and path != gone:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    """Makes names in a folder durable, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify(path: Path) -> None:
    try:
        for name, (size, digest) in _listed(path).items():
            file = path / name
            if file.suffix not in SUFFIXES or file.parent != path:
                raise Damaged(f"{name} is neither safetensors nor JSON, and nothing else is read")
            if not file.is_file():
                raise Damaged(f"{name} is missing")
            if file.stat().st_size != size:
                raise Damaged(f"{name} has {file.stat().st_size} bytes of {size}")
            with file.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    raise Damaged(f"{name} is not what was written (sha256)")
    except OSError as error:
        raise Damaged(f"it cannot be read ({error})") from None


def _listed(path: Path) -> dict[str, tuple[int, str]]:
    """Files of a checkpoint by its manifest: bytes and sha256."""
    if not (path / MANIFEST).is_file():
        raise Damaged(f"it has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        number = manifest["format"]
        files = {str(name): (int(x["bytes"]), str(x["sha256"])) for name, x in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"its {MANIFEST} is not what was written") from None
    if number != FORMAT:
        raise Damaged(f"its format is {number}, and this version reads {FORMAT}")
    if STATE not in files:
        raise Damaged(f"its {MANIFEST} names no {STATE}")
    return files
