"""Where the metrics of every step go beside metrics.jsonl if ``--log-to`` says so: TensorBoard, W&B or Trackio.

None of them is imported or contacted unless it is asked for. metrics.jsonl stays the record: a sink that fails while a
run is under way is told about once and left out, and the run goes on.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module, util
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

from trainer.base import ranks
from trainer.base.address import redacted
from trainer.base.console import visible
from trainer.base.files import write_whole
from trainer.run.folder import EVENTS, SINKS, TENSORBOARD
from trainer.run.records import record_of

Name = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "rlhf-train"
IDENTITY = re.compile(r"[0-9a-f]{8}")


class About(NamedTuple):
    """The run whose steps are sent."""

    out: Path
    config: Mapping[str, Any]
    """Its options without secrets, as ``trainer.base.config.plain`` has them."""
    quiet: bool = False
    several: bool = False
    """Several stages log here: the stage stands before the name of a metric."""
    resume: bool = False
    done: int = 0
    """Steps that lie behind a resumed run."""
    logged: int = 0
    """The last step that metrics.jsonl had before; a run that was killed had gone on after its checkpoint."""


class Sink(Protocol):
    """One place to send steps to."""

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, failed: bool) -> None: ...


def check(names: Sequence[str]) -> None:
    """Refuses a sink whose package is not installed; nothing is imported.

    Raises:
        ValueError: Names the option and the command that helps.

    >>> check(["mlflow"])
    Traceback (most recent call last):
    ValueError: log_to: got 'mlflow', want tensorboard, wandb or trackio
    """
    for name in names:
        if name not in MAKERS:
            raise ValueError(f"log_to: got {name!r}, want tensorboard, wandb or trackio")
        if ranks.mine() == 0 and not _installed(name):
            raise ValueError(f"log_to: the package {name} is missing: pip install {name}")


class Sinks:
    """The sinks of a run.

    Args:
        names: Which.
        about: The run.
        warn: Told when one of them fails.

    Raises:
        ValueError: One could not begin; where a run is resumed, that is a warning.
    """

    def __init__(self, names: Sequence[str], about: About, warn: Callable[[str], None]) -> None:
        self._about, self._warn = about, warn
        self._open: dict[str, Sink] = {}
        if not about.resume:
            (about.out / SINKS).unlink(missing_ok=True)
        for name in dict.fromkeys(names):
            try:
                self._open[name] = MAKERS[name](about)
            except Exception as error:
                if not about.resume:
                    self.close(failed=True)
                    raise ValueError(f"log_to: {name} could not begin: {_told(error)}") from error
                self._gone(name, f"could not begin ({_told(error)})")

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Sends one step; what is not finite is left out.

        Args:
            stage: Its name in metrics.jsonl.
            step: Its number there.
            values: Metrics by name.
        """
        before = f"{stage}/" if self._about.several else ""
        finite = {before + name: value for name, value in values.items() if math.isfinite(value)}
        for name, sink in list(self._open.items()):
            try:
                sink.step(stage, step, finite)
            except Exception as error:
                self._gone(name, f"failed at step {step} of {stage} ({_told(error)})")
                with suppress(Exception):
                    self._open.pop(name).close(True)

    def close(self, failed: bool = False) -> None:
        """Ends them all.

        Args:
            failed: The run did not come to its end.
        """
        while self._open:
            name, sink = self._open.popitem()
            try:
                sink.close(failed)
            except Exception as error:
                self._gone(name, f"failed at its end ({_told(error)})")

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def _gone(self, name: str, what: str) -> None:
        self._warn(f"log_to: {name} {what}; the run goes on without it, and metrics.jsonl has every step")


class TensorBoard:
    """An event file in the run folder, through TensorBoard's own writer of records, without TensorFlow.

    What an earlier file says about later steps than those that lie behind is taken back, as ``purge_step`` does.
    """

    def __init__(self, about: About) -> None:
        events = import_module("tensorboard.compat.proto.event_pb2")
        writer = import_module("tensorboard.summary.writer.record_writer")
        self._event = events.Event
        self._summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        folder = about.out / TENSORBOARD
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names. None is opened that is there already, be it a link.
        file = (folder / f"events.out.tfevents.{time.time():.6f}{EVENTS}").open("xb")
        self._writer = writer.RecordWriter(file)
        self._write(file_version="brain.Event:2")
        self._write(step=about.done + 1, session_log=events.SessionLog(status=events.SessionLog.START))

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """All metrics of a step are one event; they are on the disk when this returns."""
        shown = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=shown))

    def close(self, failed: bool) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


class Wandb:
    """A run of W&B, in its files below the run folder.

    The command line, what the run prints, and git's remotes may hold secrets, so W&B is told not to collect them.
    """

    def __init__(self, about: About) -> None:
        wandb = import_module("wandb")
        identity, self._behind = _identity(about, "wandb")
        self._several, self._stages = about.several, set()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or _name(about),
            id=identity,
            resume="allow",
            reinit="create_new",  # A run that the caller has is the caller's.
            dir=os.environ.get("WANDB_DIR") or str(about.out),
            config=dict(about.config),
            settings=wandb.Settings(
                silent=about.quiet, console="off", disable_git=True, save_code=False, x_disable_meta=True
            ),
        )

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Sends a step, unless it was sent before the run was resumed: W&B does not go back."""
        if not self._several:
            if step > self._behind:
                self._run.log(dict(values), step=step)
            return
        if stage not in self._stages:  # Each counts from 1, so none can have W&B's own step.
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({**values, f"{stage}/step": step})

    def close(self, failed: bool) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio: on this machine, or where its own variables of the environment say."""

    def __init__(self, about: About) -> None:
        self._trackio = import_module("trackio")
        identity, self._behind = _identity(about, "trackio")
        project = os.environ.get("TRACKIO_PROJECT") or os.environ.get("WANDB_PROJECT") or PROJECT
        with redirect_stdout(StringIO()):  # It prints what a terminal should not get, a log file neither.
            # Trackio finds a run to resume by its name, so no two runs may have one name.
            self._run = self._trackio.init(
                project=project, name=f"{_name(about)}-{identity}", config=dict(about.config),
                resume="allow" if about.resume else "never", embed=False,
            )  # fmt: skip

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Sends a step, unless it was sent before the run was resumed."""
        if step > self._behind:
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Waits until everything is written."""
        with redirect_stdout(StringIO()):
            self._trackio.finish()


MAKERS: dict[str, Callable[[About], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def _installed(name: str) -> bool:
    """A folder of this name, as W&B leaves one where it runs, is no package."""
    found = util.find_spec(name)
    return found is not None and found.origin is not None


def _identity(about: About, sink: str) -> tuple[str, int]:
    """What the sink knows this run by, and the last step that it has had; both are of an earlier process, if any."""
    path, known = about.out / SINKS, {}
    with suppress(OSError, ValueError, RecursionError):
        known = record_of(path.read_bytes())
    found = known.get(sink)
    if isinstance(found, str) and IDENTITY.fullmatch(found):
        return found, about.logged
    identity = secrets.token_hex(4)
    write_whole(path, json.dumps({**known, sink: identity}).encode())
    return identity, 0


def _name(about: About) -> str:
    """Of the run: that of its folder."""
    return visible(about.out.resolve().name)


def _told(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return redacted(first)
