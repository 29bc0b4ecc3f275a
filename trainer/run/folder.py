"""Whose a folder is. A run writes a few names, and only where nothing has them or a run of ours has begun; there it
replaces what a run has written and nothing else, and never what it reads, nor what lies behind a link.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trainer.base.config import RESOLVED
from trainer.base.files import DRAFT
from trainer.base.paths import model_folder
from trainer.run.checkpoint import CHECKPOINTS, MANIFEST, Checkpoints
from trainer.run.lock import alone
from trainer.run.not_finite import BATCH, NOT_FINITE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MODELS = ("model", "value")
METRICS, SAMPLES, SUMMARY, REPORT = "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"
ALARMS = "alarms.jsonl"
SINKS = "sinks.json"  # What W&B and Trackio know the run by.
TENSORBOARD, WANDB = "tensorboard", "wandb"  # These are folders of --log-to.
EVENTS = ".rlhf-train"  # Names of our event files in TENSORBOARD end so.
LOGS = (SUMMARY, METRICS, SAMPLES, ALARMS, REPORT, SINKS)
FILES = (*LOGS, RESOLVED, "train.jsonl", "held_out.jsonl", "facts.json")  # All stages together write these.
DRAFTS = tuple(name + DRAFT for name in FILES if name != RESOLVED)  # A run that died early has left that of RESOLVED.
SWAPS = tuple(f".{model}{how}" for model in MODELS for how in (DRAFT, ".replaced"))
Own = tuple[str, Sequence[str]]  # a stage, and the folders that it alone writes
NOTHING: Own = ("", ())
NAMES = (*FILES, *DRAFTS, *MODELS, *SWAPS, CHECKPOINTS, NOT_FINITE)


def claim(out_dir: str | Path, *, overwrite: bool = False, reads: Sequence[Any] = (), own: Own = NOTHING) -> Path:
    """Makes a run folder ready for a new run; logs and checkpoints of an earlier run in it are cleared away.

    Args:
        out_dir: The run folder; made if need be.
        overwrite: Clear away a finished run as well, or one that can go on. Models stay until the new run replaces
            them, and files of others stay for good.
        reads: Configs of the run, whose inputs are not to be written over.
        own: A stage, and further folders that it alone writes.

    Returns:
        The folder.

    Raises:
        ValueError: What ``check_folder`` raises.
    """
    folder = check_folder(out_dir, overwrite=overwrite, reads=reads, own=own)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        Checkpoints(folder).clear()
        for name in LOGS:
            (folder / name).unlink(missing_ok=True)
        if not (folder / TENSORBOARD).is_symlink():
            for events in (folder / TENSORBOARD).glob(f"events.out.tfevents.*{EVENTS}"):
                events.unlink()
    return folder


def check_folder(
    out_dir: str | Path, *, overwrite: bool = False, reads: Sequence[Any] = (), own: Own = NOTHING
) -> Path:
    """Whether ``claim`` may do its work; nothing is changed, and no folder is made.

    Raises:
        ValueError: It holds, under a name that a run writes, what is of no run of ours, whatever ``overwrite`` says; or
            a link under such a name; or a finished run, or one that can go on, and ``overwrite`` is false; or a run is
            under way in it; or the run would write over what it reads.
    """
    folder = Path(out_dir)
    with alone(folder) if folder.is_dir() else nullcontext():
        refuse_others(folder, names=(*NAMES, *sink_folders(*reads)), own=own)
    for config in reads:
        refuse_inputs(config, folder)
    refuse_links(folder, folders=(*MODELS, *own[1]))
    if (folder / SUMMARY).exists() and not overwrite:
        raise ValueError(f"out: {folder} holds a finished run; pass --overwrite to replace it, or another --out")
    if has_checkpoints(folder) and not overwrite:
        raise ValueError(
            f"out: {folder} holds a run that was stopped: `rlhf-train resume {folder}` goes on with it, --overwrite "
            "starts again"
        )
    return folder


def sink_folders(*configs: Any) -> list[str]:
    """Folders that ``log_to`` of a run writes; nobody else's business, and so free for others where it does not."""
    return [name for name in (TENSORBOARD, WANDB) if any(name in getattr(c, "log_to", ()) for c in configs)]


def has_checkpoints(out_dir: str | Path) -> bool:
    """A run in this folder was stopped, and can go on."""
    found = Checkpoints(out_dir)
    return any((found.folder / name / MANIFEST).is_file() for name in found.names())


def is_ours(folder: Path) -> bool:
    """Whether a run of ours began here: it writes resolved.yaml before anything else, with its versions on top."""
    return stage_in(folder) is not None


def stage_in(folder: Path) -> str | None:
    """What the mark of a folder says; None without one, and a link marks the folder that it leads to, if any."""
    try:
        lines = [] if (folder / RESOLVED).is_symlink() else (folder / RESOLVED).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    said = any(line.startswith("#") and "rlhf_kernels " in line for line in lines)
    stages = [line.removeprefix("stage: ") for line in lines if line.startswith("stage: ")]
    return stages[0] if said and stages else None


def refuse_others(folder: Path, *, names: Sequence[str] = NAMES, own: Own = NOTHING) -> None:
    """Refuses a folder with something in it that a run would write over, and that no run of ours began.

    Args:
        folder: The run folder.
        names: What the run writes. Whatever has another name stays, and is nobody's business here.
        own: A stage, and further folders that it writes: where another stage began, they are somebody's.

    Raises:
        ValueError: It is one, or it is no folder at all.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, want a folder")
    if os.path.realpath(folder) == os.path.realpath(os.path.expanduser("~")):
        raise ValueError(f"out: {folder} is your home, want a folder for the run alone")
    marked, (stage, folders) = stage_in(folder), own
    looked_at = (*(names if marked is None else ()), *(folders if marked != stage else ()))
    there = sorted(name for name in looked_at if _holds(folder / name))
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(
            f"out: {folder} holds {there[0]}{more} but no run of ours{f' of {stage}' if marked else ''} ({RESOLVED}), "
            "and a run writes what is called so; want another folder, or that of an earlier run"
        )


def _holds(path: Path) -> bool:
    """Whether there is something to lose: not in an empty folder, and behind a link to another disk only ours is."""
    if path.name == CHECKPOINTS and path.is_symlink():
        return Checkpoints(path.parent).begun()
    return any(path.iterdir()) if path.is_dir() else path.exists()


def refuse_links(folder: Path, *, folders: Sequence[str] = MODELS) -> None:
    """Refuses links among the names that a run writes, but for folders on another disk that it may have for itself.

    Args:
        folder: The run folder; it may be a link, since its name was given by hand.
        folders: Names of those that it writes anew.

    Raises:
        ValueError: A file is a link; or a folder is one, to what is there already.
    """
    inside = tuple(f"{NOT_FINITE}/{name}" for name in BATCH)
    for link in (folder / name for name in (*FILES, *inside) if (folder / name).is_symlink()):
        raise ValueError(f"out: {link} is a link to {link.resolve()}, and a run writes into this file; unlink it")
    sinks = (TENSORBOARD, WANDB) if is_ours(folder) else ()
    for link in (folder / name for name in sinks if (folder / name).is_symlink()):
        raise ValueError(f"out: {link} is a link to {link.resolve()}, and --log-to writes into this folder; unlink it")
    for link in (folder / name for name in (*folders, NOT_FINITE)):
        if link.is_symlink() and _holds(link) and not is_ours(link):  # Nobody can tell whose that is.
            raise ValueError(f"out: {link} is a link to {link.resolve()}, which is not empty; empty it, or unlink it")
    link = folder / CHECKPOINTS
    if link.is_symlink():
        home = Path(os.path.realpath(link)).parent
        if (home != Path(os.path.realpath(folder)) and is_ours(home)) or Checkpoints(folder).others():
            raise ValueError(f"out: {link} is a link to {link.resolve()}, which is of another run; unlink it")


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
    places = [Path(os.path.realpath(out / name)) for name in (*MODELS, CHECKPOINTS, NOT_FINITE, *sink_folders(config))]
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
