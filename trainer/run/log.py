"""The run folder while a run is under way: metrics.jsonl, samples.jsonl, summary.json, and what the screen shows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.base.console import Console, say
from trainer.base.files import told, write_whole
from trainer.run.folder import ALARMS, METRICS, SAMPLES, SUMMARY
from trainer.run.records import records as records
from trainer.run.sinks import Sinks

SHOWN_SAMPLES = 4


class RunLog:
    """Writes a run's logs and shows its progress.

    Args:
        out_dir: The run folder; made if need be. Existing logs are appended to.
        quiet: Write the files, print nothing.
    """

    def __init__(self, out_dir: str | Path, quiet: bool = False) -> None:
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.console = Console(quiet)
        self.sinks: Sinks | None = None  # Whoever opens some closes them.

    def start(self, stage_name: str, total_steps: int, *, done: int = 0) -> Bar:
        """One stage's progress bar, as a context manager; `bar.step({...})` logs a step.

        Args:
            stage_name: Names the stage in metrics.jsonl and in the report's plots; several arms, several names.
            total_steps: How many times `step` will be called, by this run and the one that it resumes.
            done: How many of these times lie behind.

        Raises:
            ValueError: `total_steps` is not positive.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps: got {total_steps}, want at least 1")
        return Bar(self, stage_name, total_steps, done)

    def table(self, title: str, rows: Sequence[tuple[str, ...]]) -> None:
        """Shows a small table: a name and one or more values per row."""
        self.console.table(title, [tuple(map(str, row)) for row in rows])

    def samples(self, title: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends samples to samples.jsonl and shows the first few.

        Args:
            title: What the samples show; the report groups by it.
            samples: Text under names such as prompt, before, after; numbers (scores) are welcome beside it.
        """
        _append(self.out_dir / SAMPLES, ({"title": title, **sample} for sample in samples))
        self.console.samples(title, samples[:SHOWN_SAMPLES])

    def last_step(self, stage_name: str) -> int:
        """The last step of a stage that was logged, perhaps by an earlier run in this folder; 0 if there is none."""
        logged = (r.get("step") for r in records(self.out_dir / METRICS) if r.get("stage") == stage_name)
        return max((step for step in logged if isinstance(step, int)), default=0)

    def samples_bytes(self) -> int:
        """Size of samples.jsonl, for ``cut``."""
        path = self.out_dir / SAMPLES
        return path.stat().st_size if path.exists() else 0

    def sync(self) -> None:
        """Waits until what was logged is on the disk."""
        for path in (self.out_dir / name for name in (METRICS, SAMPLES, ALARMS)):
            if path.exists():
                with path.open("ab") as file:
                    os.fsync(file.fileno())

    def cut(self, stage_name: str, step: int, samples_bytes: int | None) -> None:
        """Takes back what was logged after a checkpoint, half a line at the end included.

        Args:
            stage_name: The stage whose metrics are meant; those of others stay.
            step: The last step to keep.
            samples_bytes: How much of samples.jsonl to keep; None is all of it.
        """
        for name in (METRICS, ALARMS):
            path = self.out_dir / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if not _is_beyond(line, stage_name, step)]
            if kept != lines:
                write_whole(path, b"".join(kept))
        path = self.out_dir / METRICS
        records = map(json.loads, path.read_bytes().splitlines() if path.exists() else [])
        if [r["step"] for r in records if r.get("stage") == stage_name] != list(range(1, step + 1)):
            self.warn(f"{path} should hold steps 1 to {step} of {stage_name}, and does not: it was changed meanwhile")
        if samples_bytes is not None and self.samples_bytes() > samples_bytes:
            os.truncate(self.out_dir / SAMPLES, samples_bytes)

    def note(self, text: str) -> None:
        """Shows a line of text."""
        self.console.note(text)

    def warn(self, text: str) -> None:
        """Says what has to be known, to standard error, in a quiet run too."""
        say(text, error=True)

    def summary(self, summary: Mapping[str, Any]) -> Path:
        """Writes summary.json, all of it or nothing; its presence marks the run as finished.

        Args:
            summary: Tables for the report, as `trainer.report.page.write` describes them.

        Returns:
            The path of the file.
        """
        text = json.dumps(_jsonable(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_whole(self.out_dir / SUMMARY, text.encode(errors="backslashreplace"))


class Bar:
    """A stage under way; made by `RunLog.start`."""

    def __init__(self, run_log: RunLog, stage: str, total: int, done: int) -> None:
        self.stage, self.steps = stage, done
        self._path, self._log = run_log.out_dir / METRICS, run_log
        self._shown = run_log.console.progress(stage, total, done)

    def __enter__(self) -> Bar:
        self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace")
        self._shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._shown.stop()
        # A line that did not fit on the disk does not fit now either; the first error is the one to tell.
        with suppress(*([OSError] if error is not None else [])):
            self._file.close()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Logs one step, counted from 1, and flushes it to disk.

        Args:
            metrics: Names to numbers (Python or 0-d tensors); not-a-number and infinities are written as null.

        Raises:
            OSError: The disk is full, or worse.
        """
        self.steps += 1
        values = {name: float(value) for name, value in metrics.items()}
        try:
            self._file.write(_line({"stage": self.stage, "step": self.steps, **values}))
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"step {self.steps} could not be logged: {error.strerror}", str(self._path)
            ) from error
        if self._log.sinks is not None:
            self._log.sinks.step(self.stage, self.steps, values)
        self._shown.step(self.steps, values)


def _is_beyond(line: bytes, stage_name: str, step: int) -> bool:
    """A line of a later step, or the half of one."""
    try:
        record = json.loads(line)
        return not line.endswith(b"\n") or (record["stage"] == stage_name and record["step"] > step)
    except (ValueError, KeyError, TypeError):
        return True


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    # Half a surrogate pair has no bytes in UTF-8; escaped with a backslash it is what JSON writes for it.
    with told(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(_line(record) for record in records)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    """JSON has no not-a-number; tensors and numpy scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _jsonable(value.tolist()) if hasattr(value, "tolist") else str(value)
