"""The run folder while a run is under way: metrics.jsonl, samples.jsonl, summary.json, and what the screen shows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.console import Console

METRICS, SAMPLES, SUMMARY, REPORT = "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"
SHOWN_SAMPLES = 4


def claim(out_dir: str | Path, *, overwrite: bool = False) -> Path:
    """Makes a run folder ready for a new run; logs of an earlier run that never finished are cleared away.

    Args:
        out_dir: The run folder; made if need be.
        overwrite: Clear the logs of a finished run as well. Models stay until the new run replaces them.

    Returns:
        The folder.

    Raises:
        ValueError: It holds a finished run and `overwrite` is false, or it is a file.
    """
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, want a folder")
    if (folder / SUMMARY).exists() and not overwrite:
        raise ValueError(f"out: {folder} holds a finished run; pass --overwrite to replace it, or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY, METRICS, SAMPLES, REPORT):
        (folder / name).unlink(missing_ok=True)
    return folder


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

    def start(self, stage_name: str, total_steps: int) -> Bar:
        """One stage's progress bar, as a context manager; `bar.step({...})` logs a step.

        Args:
            stage_name: Names the stage in metrics.jsonl and in the report's plots; several arms, several names.
            total_steps: How many times `step` will be called.

        Raises:
            ValueError: `total_steps` is not positive.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps: got {total_steps}, want at least 1")
        return Bar(self, stage_name, total_steps)

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

    def note(self, text: str) -> None:
        """Shows a line of text."""
        self.console.note(text)

    def summary(self, summary: Mapping[str, Any]) -> Path:
        """Writes summary.json, all of it or nothing; its presence marks the run as finished.

        Args:
            summary: Tables for the report, as `trainer.report.write` describes them.

        Returns:
            The path of the file.
        """
        path = self.out_dir / SUMMARY
        draft = path.with_suffix(".tmp")
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_jsonable(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return path


class Bar:
    """A stage under way; made by `RunLog.start`."""

    def __init__(self, run_log: RunLog, stage: str, total: int) -> None:
        self.stage, self.steps = stage, 0
        self._path = run_log.out_dir / METRICS
        self._shown = run_log.console.progress(stage, total)

    def __enter__(self) -> Bar:
        self._file = self._path.open("a", encoding="utf-8")
        self._shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._shown.stop()
        self._file.close()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Logs one step, counted from 1, and flushes it to disk.

        Args:
            metrics: Names to numbers (Python or 0-d tensors); not-a-number and infinities are written as null.
        """
        self.steps += 1
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line({"stage": self.stage, "step": self.steps, **values}))
        self._file.flush()
        self._shown.step(self.steps, values)


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
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
