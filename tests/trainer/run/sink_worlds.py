"""Sinks that only listen, what TensorBoard reads of a run, and runs that crash."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.runs import train
from tests.support.small import lines
from trainer.run.log import Bar
from trainer.training.options import StageConfig

VARIABLES = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "TRACKIO_PROJECT")


class Fake(ModuleType):
    """Stands for wandb and trackio: the part of their interface that is used, and every call of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="fake")
        self.inits: list[dict[str, Any]] = []
        self.logs: list[tuple[dict[str, float], int | None]] = []
        self.calls: list[Any] = []
        self.broken_at: int | None = None

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, **options: Any) -> Any:
        print(f"{self.__name__} says hello")
        self.inits.append(options)
        return SimpleNamespace(log=self._log, finish=self.finish, define_metric=self._define)

    def finish(self, **options: Any) -> None:
        self.calls.append(("finish", options))

    def _define(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def _log(self, values: dict[str, float], step: int | None = None) -> None:
        if step is not None and step == self.broken_at:
            raise ConnectionError("https://me:S3CRET@host is gone")
        self.logs.append((values, step))


def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """wandb and trackio as they are found from now on."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    made = {name: Fake(name) for name in ("wandb", "trackio")}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return made


def logged(out: Path) -> list[tuple[dict[str, float], int]]:
    """What metrics.jsonl has, as sinks get it."""
    rows = [dict(row) for row in lines(out / "metrics.jsonl")]
    steps = [(row.pop("stage") and row.pop("step"), row) for row in rows]
    return [({k: v for k, v in row.items() if v is not None}, step) for step, row in steps]


def read_back(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard finds in the event files of a run: points by tag, values in float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def as_points(steps: list[tuple[dict[str, float], int]]) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for values, step in steps:
        for name, value in values.items():
            points.setdefault(name, []).append((step, float(np.float32(value))))
    return points


def crash_after(step: int, cfg: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends without a checkpoint, once this step is in the logs."""
    inner = Bar.step

    def stepped(bar: Bar, metrics: dict[str, float]) -> None:
        inner(bar, metrics)
        if bar.steps == step:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "step", stepped)
        with pytest.raises(RuntimeError, match="machine is gone"):
            train(cfg)
