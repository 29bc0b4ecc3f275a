"""One stage's run while it runs: its log, its checkpoints, and how it stops."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from trainer.base import ranks
from trainer.base.config import plain, versions
from trainer.run import fingerprint, sinks
from trainer.run import mark as run_mark
from trainer.run.checkpoint import Checkpoint, Checkpoints
from trainer.run.folder import SUMMARY
from trainer.run.lock import alone
from trainer.run.log import RunLog
from trainer.run.sinks import About, Sinks
from trainer.run.stops import Interrupted, Terminated, stop_signals
from trainer.training.defaults import decided, told
from trainer.training.options import StageConfig
from trainer.training.progress import Progress
from trainer.training.setup import prepare
from trainer.training.state import Mark, Restored

SECONDS = 600.0  # between checkpoints, unless counted in steps


class Savable(Protocol):
    """A model that knows how to write itself."""

    def save(self, path: Path | str) -> None: ...


class Session:
    """A stage in progress, as a context manager.

    ``steps`` is the stage's loop; whatever follows it inside the ``with`` is done again by a run that was stopped
    there. Where a stop falls between two safe points, the run goes back to the former, which costs nothing but time:
    models and optimizers have not changed since. Without an error, the last thing it does is remove the checkpoints.

    Args:
        cfg: The configuration; it is checked, and every random generator seeded. What it leaves to the model is
            decided, and told.
        log: Where to log; None makes a log in ``cfg.out``.
        name: Of the stage in the log.
        resume: Go on from the last checkpoint in ``cfg.out``, or from the beginning if there is none. Otherwise
            checkpoints of an earlier run are removed.

    Raises:
        ValueError: If the run would write over what it reads, or over what is of others. On entry, if the checkpoint
            was made with other options, data or models, which are listed; or if another process is training in the
            same folder.
    """

    def __init__(self, cfg: StageConfig, log: RunLog | None, name: str, *, resume: bool = False) -> None:
        self._told, cfg = told(cfg), decided(cfg)
        if not resume:  # What a run sends elsewhere is no reason not to finish it.
            sinks.check(cfg.log_to)
        self.device = prepare(cfg)
        self.cfg, self.name = cfg, name
        run_mark.look(cfg, logs=log is None)
        self.own, self.log = log is None, log or RunLog(cfg.out, quiet=cfg.quiet)
        self.resume = resume
        self.checkpoints = Checkpoints(cfg.out, cfg.keep_last)
        self._about: dict[str, Any] = {}
        self._found: Checkpoint | None = None
        self._mark: Mark | None = None
        self._samples, self._saved, self._saved_at = 0, "", time.monotonic()
        self._sinks: Sinks | None = None
        self._handling, self._waiting, self._shown = ExitStack(), ExitStack(), ExitStack()

    def __enter__(self) -> Session:
        with ExitStack() as opening:
            opening.enter_context(alone(self.cfg.out))
            opening.enter_context(stop_signals.handled())
            self._prepare()
            self._handling = opening.pop_all()
        self._waiting.enter_context(stop_signals.interruptible())
        if self.own and self._told:
            self.log.note(self._told)
        return self

    def _prepare(self) -> None:
        """Finds out what the run depends on, and whether that is what it was."""
        with stop_signals.interruptible():
            inputs = fingerprint.inputs(self.cfg)
            self._about = {"stage": self.name, "config": plain(self.cfg), "inputs": inputs} | self._machine()
            self._found = self.checkpoints.latest(self.log.warn) if self.resume else None
        if self._found is not None:
            self._compare(self._found.state)
        run_mark.mark(self.cfg, self.name, inputs)
        if not self.resume:
            self._clear()
            if self.own:  # That of an earlier run would say that this one is finished.
                (Path(self.cfg.out) / SUMMARY).unlink(missing_ok=True)
        if self.cfg.log_to and self.log.sinks is None and ranks.mine() == 0:
            with stop_signals.interruptible():
                self._sinks = self.log.sinks = Sinks(self.cfg.log_to, self._about_run(), self.log.warn)

    def _about_run(self) -> About:
        """What sinks are told; metrics.jsonl still has what was logged after the checkpoint."""
        done = self._found.state["state"]["step"] if self._found is not None else 0
        logged = self.log.last_step(self.name) if self.resume else 0
        return About(
            Path(self.cfg.out), plain(self.cfg), quiet=self.cfg.quiet, resume=self.resume, done=done, logged=logged
        )

    def steps(self, state: Progress, total: int) -> Iterator[None]:
        """The loop: yields until ``done`` was called for all steps, or the state is over.

        Args:
            state: The stage's, as at the beginning; a resumed run's is brought to where that one stood.
            total: Steps of the stage.
        """
        self._waiting.close()
        self.state, self.total = state, total
        self._begin()
        self._bar = self._shown.enter_context(self.log.start(self.name, total, done=state.step))
        self._tick()
        while state.step < total and not state.over:
            yield
        self._shown.close()
        self._waiting.enter_context(stop_signals.interruptible())

    def done(self, metrics: Mapping[str, Any]) -> None:
        """Ends a step: counts and logs it. A safe point."""
        self.state.step, self.state.part = self.state.step + 1, 0
        self.state.last = {name: float(value) for name, value in metrics.items()}
        self._bar.step(self.state.last)
        every = self.cfg.save_every
        self._tick(due=every is not None and self.state.step % every == 0)

    def safe_point(self) -> None:
        """Within a step, between two changes of models: a run may be stopped and resumed here."""
        self.state.part += 1
        self._tick()

    def save(self, model: Savable, name: str = "model") -> None:
        """Saves a finished model in the run folder.

        Raises:
            OSError: The disk is full, or worse. The run can be resumed where there is room.
        """
        if ranks.mine() > 0:
            return  # the first rank does
        path = self.cfg.out / name
        try:
            model.save(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path} could not be written: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._shown.close()
        self._waiting.__exit__(kind, error, tb)
        with self._handling, self._closing_sinks(failed=error is not None):
            if error is None:
                self._clear()
            elif self._mark is not None and (
                isinstance(error, Interrupted | Terminated) or stop_signals.escaped is error
            ):
                what = "stopped" if isinstance(error, Interrupted | Terminated) else "failed"
                if self._save(self._mark):
                    self.log.warn(f"{self.name}: {what} at step {self._mark.step} of {self.total}; saved")

    @contextmanager
    def _closing_sinks(self, *, failed: bool) -> Iterator[None]:
        """They come last: everything is on the disk when W&B waits for its network."""
        try:
            yield
        finally:
            if self._sinks is not None:
                self._sinks.close(failed)
                self.log.sinks = None

    def _clear(self) -> None:
        if ranks.mine() == 0:  # The other ranks read its checkpoints through a link.
            self.checkpoints.clear()

    def _begin(self) -> None:
        """Puts the state, and the log, where the checkpoint stood."""
        if self._found is None:
            if self.resume:
                self.log.cut(self.name, 0, 0 if self.own else None)
            return
        saved = self._found.state
        Restored(saved["state"], self._found.tensors, self.device).into(self.state)
        self.log.cut(self.name, self.state.step, saved["samples_bytes"])
        self.log.note(f"{self.name}: resumed at step {self.state.step} of {self.total}")
        self._saved, self._found = self._found.path.name, None

    def _tick(self, *, due: bool = False) -> None:
        self._mark, self._samples = Mark(self.state), self.log.samples_bytes()
        stop_signals.check()
        late = self.cfg.save_every is None and time.monotonic() - self._saved_at >= SECONDS
        if due or late:
            self._save(self._mark)

    def _save(self, mark: Mark) -> bool:
        """Saves; if that fails, says so, and the run goes on with the checkpoint it has."""
        name = f"step-{mark.step:07d}" + (f".{mark.part:05d}" if mark.part else "")
        if name == self._saved or ranks.mine() > 0:
            return True
        try:
            self.log.sync()
            about = self._about | {"samples_bytes": self._samples, "state": mark.plain()}
            self.checkpoints.save(name, about, mark.tensors())
        except OSError as error:
            kept = f"{self._saved} is kept" if self._saved else "there is none yet"
            self.log.warn(f"{self.name}: checkpoint {name} could not be written ({error}); {kept}")
            return False
        finally:
            self._saved_at = time.monotonic()
        self._saved = name
        return True

    def _machine(self) -> dict[str, Any]:
        return {"device": self.device.type, "threads": torch.get_num_threads(), "versions": versions()}

    def _compare(self, saved: Mapping[str, Any]) -> None:
        """Refuses another run's checkpoint; mentions what may change bits."""
        now = self._about
        if "prompt_format" not in saved["config"]:
            raise ValueError(
                f"resume: {os.fspath(self.cfg.out)} was begun by an earlier version, which read prompts and replies in "
                "another way; start a new run with another --out"
            )
        hashed = saved["inputs"].keys() & now["inputs"].keys()
        differ = fingerprint.differences(saved["config"], now["config"], hashed)
        differ += [f"device: {saved['device']} at the checkpoint, {now['device']} now"] * (
            saved["device"] != now["device"]
        )
        if "template_date" in hashed and saved["inputs"]["template_date"] != now["inputs"]["template_date"]:
            days = f"{saved['inputs']['template_date']} at the checkpoint, {now['inputs']['template_date']} now"
            differ.append(f"template_date: {days}, and the chat template of the model writes it")
        for option in sorted(hashed - {"template_date"}):
            if saved["inputs"][option] != now["inputs"][option]:
                was, is_now = saved["inputs"][option][:12], now["inputs"][option][:12]
                path = now["config"].get(option, "it")
                differ.append(f"{option}: the contents of {path} have changed (sha256 {was}... then, {is_now}... now)")
        if differ:
            raise ValueError(
                f"resume: {os.fspath(self.cfg.out)} cannot go on, because this is not the run that was saved:\n  "
                + "\n  ".join(differ)
                + "\nPut back what was there, or start a new run with another --out."
            )
        for what in ("threads", "versions"):
            if saved[what] != now[what]:
                self.log.warn(f"{what}: {saved[what]} then, {now[what]} now; the result may differ in its last bits")
