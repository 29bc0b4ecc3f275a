"""Runs that begin from Python: they look at their folder, and mark it as the command line does."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.base import config as config_file
from trainer.base import ranks
from trainer.base.subcommands import STAGES
from trainer.base.threads import used_threads
from trainer.run import fingerprint
from trainer.run import folder as run_folder
from trainer.run.log import RunLog


def look(config: Any, *, logs: bool = True) -> None:
    """Refuses a folder that a run may not write into; nothing is changed.

    Args:
        config: A flat dataclass with the run folder in ``out``.
        logs: The run keeps its logs there; otherwise those that lie there are the caller's.

    Raises:
        ValueError: Something in it has a name that a run writes and is of no run of ours, or such a name is a link.
    """
    if ranks.mine() > 0:  # Its folder is its own, and the link in it leads to the first rank's checkpoints.
        return
    out = Path(config.out)
    names = [name for name in run_folder.NAMES if logs or name not in run_folder.LOGS]
    run_folder.refuse_others(out, names=[*names, *run_folder.sink_folders(config)])
    run_folder.refuse_links(out)


def mark(config: Any, stage: str, inputs: Mapping[str, str] | None = None) -> None:
    """Writes ``resolved.yaml``, unless it says already what this run is.

    Args:
        config: A flat dataclass with the run folder in ``out``.
        stage: The name of a stage whose config the command line does not know.
        inputs: Options and the sha256 of what they name.
    """
    if ranks.mine() > 0:
        return
    out, known = Path(config.out), stage_of(config) or stage
    if run_folder.is_ours(out) and _says(out / config_file.RESOLVED, known, config):
        return
    about = f"begun from Python, {config_file.version()}, python {platform.python_version()}"
    sums = [f"{option}: sha256 {digest}" for option, digest in (inputs or {}).items()]
    config_file.write_resolved(out, config, [about, *sums], {"stage": known, "threads": used_threads()})


def opened(config: Any, stage: str, log: RunLog | None = None) -> RunLog:
    """The log of a run without checkpoints, after its folder was looked at, and marked if it was not.

    A run that trained there, and may go on, keeps its mark.

    Raises:
        ValueError: What ``look`` raises.
    """
    look(config, logs=log is None)
    if run_folder.stage_in(Path(config.out)) in (None, stage):
        mark(config, stage)
    return log or RunLog(config.out, quiet=config.quiet)


def stage_of(config: Any) -> str | None:
    """The subcommand that takes such a config."""
    kind = type(config)
    ours = kind.__module__.startswith("trainer.")
    return next((name for name, stage in STAGES.items() if ours and stage.config == kind.__name__), None)


def _says(path: Path, stage: str, config: Any) -> bool:
    """Whether it holds this stage and these options, but for those that a resumed run may change."""
    try:
        then = config_file.load(path)
    except ValueError:  # It is that of a pipeline, or was changed by hand.
        return False
    same = then.pop("stage", None) == stage
    then.pop("threads", None)
    return same and not fingerprint.differences(then, config_file.resolved(config), {})
