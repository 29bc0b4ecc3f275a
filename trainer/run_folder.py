"""Whose a folder is. A run writes into a new folder, an empty one or one of ours; there it replaces what a run has
written and nothing else, and never what it reads.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from trainer.checkpoint import CHECKPOINTS, MANIFEST, Checkpoints
from trainer.config_file import RESOLVED, model_folder
from trainer.files import DRAFT

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MODELS, NOT_FINITE = ("model", "value"), "not_finite"
METRICS, SAMPLES, SUMMARY, REPORT = "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"
ALARMS = "alarms.jsonl"
LOGS = (SUMMARY, METRICS, SAMPLES, ALARMS, REPORT)
FILES = (*LOGS, RESOLVED, "train.jsonl", "held_out.jsonl", "facts.json")  # All stages together write these.


def claim(out_dir: str | Path, *, overwrite: bool = False, reads: Sequence[Any] = ()) -> Path:
    """Makes a run folder ready for a new run; logs and checkpoints of an earlier run in it are cleared away.

    Args:
        out_dir: The run folder; made if need be.
        overwrite: Clear away a finished run as well, or one that can go on. Models stay until the new run replaces
            them, and files of others stay for good.
        reads: Configs of the run, whose inputs are not to be written over.

    Returns:
        The folder.

    Raises:
        ValueError: What ``check`` raises.
    """
    folder = check(out_dir, overwrite=overwrite, reads=reads)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        Checkpoints(folder).clear()
        for name in LOGS:
            (folder / name).unlink(missing_ok=True)
    return folder


def check(out_dir: str | Path, *, overwrite: bool = False, reads: Sequence[Any] = ()) -> Path:
    """Whether ``claim`` may do its work; nothing is changed, and no folder is made.

    Raises:
        ValueError: It holds what is no run of ours, whatever ``overwrite`` says; or a finished run, or one that can go
            on, and ``overwrite`` is false; or a run is under way in it; or the run would write over what it reads.
    """
    folder = Path(out_dir)
    with alone(folder) if folder.is_dir() else nullcontext():
        refuse_others(folder)
    for config in reads:
        refuse_inputs(config, folder)
    for link in (folder / name for name in MODELS if (folder / name).is_symlink()):
        if link.is_dir() and any(link.iterdir()):  # Nobody can tell whose model that is.
            raise ValueError(f"out: {link} is a link to {link.resolve()}, which is not empty; empty it, or unlink it")
    if (folder / SUMMARY).exists() and not overwrite:
        raise ValueError(f"out: {folder} holds a finished run; pass --overwrite to replace it, or another --out")
    if has_checkpoints(folder) and not overwrite:
        raise ValueError(
            f"out: {folder} holds a run that was stopped: `rlhf-train resume {folder}` goes on with it, --overwrite "
            "starts again"
        )
    return folder


def has_checkpoints(out_dir: str | Path) -> bool:
    """A run in this folder was stopped, and can go on."""
    found = Checkpoints(out_dir)
    return any((found.folder / name / MANIFEST).is_file() for name in found.names())


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


def is_ours(folder: Path) -> bool:
    """Whether a run of ours began here: it writes resolved.yaml before anything else, with its versions on top."""
    try:
        lines = (folder / RESOLVED).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    said = any(line.startswith("#") and "rlhf_kernels " in line for line in lines)
    return said and any(line.startswith("stage: ") for line in lines)


def refuse_others(folder: Path) -> None:
    """Refuses a folder with anything in it that no run of ours began.

    Raises:
        ValueError: It is one, or it is no folder at all.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, want a folder")
    there = sorted(p.name for p in folder.iterdir() if p.name != RESOLVED + DRAFT) if folder.is_dir() else []
    if there and not is_ours(folder):
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(
            f"out: {folder} holds {there[0]}{more} but no run of ours ({RESOLVED}), so nothing in it is touched; want "
            "a new folder, an empty one, or that of an earlier run"
        )


def refuse_models(folder: Path) -> None:
    """The same for a caller's own folder, where no resolved.yaml is written: a model in it has to be of a run.

    Raises:
        ValueError: There is a model, and neither a log of ours nor resolved.yaml.
    """
    for name in MODELS:
        if (folder / name).exists() and not (folder / METRICS).exists() and not is_ours(folder):
            raise ValueError(f"out: {folder / name} is there already, and of no run of ours; want another folder")


def refuse_inputs(config: Any, out: Path | None = None) -> None:
    """Refuses a run that would write over what it reads, by whatever names the two go.

    Args:
        config: A flat dataclass of options.
        out: The run folder, if it is not that of the config.

    Raises:
        ValueError: A model would be replaced, or get or hold a folder of the run; or a data file has the name of a file
            that a run writes or clears away.
    """
    out = Path(config.out) if out is None else out
    places = [Path(os.path.realpath(out / name)) for name in (*MODELS, CHECKPOINTS, NOT_FINITE)]
    files = {Path(os.path.realpath(out / name)) for name in FILES}
    for option, read in _named(config):
        real = Path(os.path.realpath(read))
        for place in places:
            if real == place or real in place.parents or place in real.parents:
                raise ValueError(f"{option}: {read} is an input, and the run would write {place}; want another --out")
        if real in files:
            raise ValueError(f"{option}: {read} is an input, and a run writes a file of this name; want another --out")


def _named(config: Any) -> Iterator[tuple[str, Path]]:
    """Models and files that options name, also among other words, as in helpful=runs/a,runs/b@0.5."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "out":
            continue
        for text in (
            str(x) for x in (value if isinstance(value, tuple | list) else (value,)) if isinstance(x, str | Path)
        ):
            for part in dict.fromkeys(filter(None, (text, *re.split("[=,@]", text)))):
                if (folder := model_folder(part)) is not None:
                    yield field.name, folder
                elif Path(part).is_file():
                    yield field.name, Path(part)
