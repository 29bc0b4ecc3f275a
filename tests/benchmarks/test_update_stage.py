"""The GPU's update stage, walked through on a CPU: everybody gets a row, and whoever fails takes nobody with it."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.gpu import stages
from benchmarks.gpu.record import NO_TIME
from benchmarks.work import update as work
from trainer.models import attention


class Here:
    """What a stage is given in a dry run."""

    device, place, dry, backend = "cuda", "cpu", True, "auto"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def left(self) -> float:
        return 60.0

    def row(self, **cells: Any) -> None:
        self.rows.append(cells)

    def cut(self, what: str, **cells: Any) -> None:
        self.row(what=what, **cells, skipped=NO_TIME)

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def attempt(self, what: str):
        try:
            yield
        except Exception as error:
            self.row(what=what, failed=f"{type(error).__name__}: {error}")


@pytest.fixture
def update(monkeypatch):
    """The stage with a clock that reads the host's time."""
    clock = ModuleType("benchmarks.gpu.stages.clock")

    def once(step: Any) -> float:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    def in_turns(steps: dict[str, Any], rounds: int, left: Any) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(once(step))
        return times

    def peak(step: Any) -> float:
        step()
        return 1.0

    vars(clock).update(once=once, in_turns=in_turns, peak=peak)
    # another test of this process may have imported both, and a package remembers its modules as attributes
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.stages.clock", clock)
    monkeypatch.setattr(stages, "clock", clock, raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.gpu.stages.update", raising=False)
    monkeypatch.delattr(stages, "update", raising=False)
    yield importlib.import_module("benchmarks.gpu.stages.update")
    sys.modules.pop("benchmarks.gpu.stages.update", None)
    vars(stages).pop("update", None)


def test_every_step_of_every_model_has_times_and_memory(update):
    here = Here()
    update.run(here)
    steps = ["value", *work.LOSSES, update.PADDED]
    timed = {(row["model"], row["step"]): row for row in here.rows if "ms" in row}
    assert list(timed) == [(model, step) for model in update.TINY for step in steps]
    assert all(row["tokens_per_s"] > 0 and row["rounds"] == update.ROUNDS for row in timed.values())
    assert all(row["update_ms"] > row["ms"] for (_, step), row in timed.items() if step != "value")
    agreed = [row for row in here.rows if "head_gradient" in row]
    assert len(agreed) == 2 * len(update.TINY)
    assert all(row["loss"] < 1e-2 and row["head_gradient"] < 2e-2 and row["ok"] for row in agreed)
    assert not [row for row in here.rows if "failed" in row]


def test_who_runs_out_of_memory_has_a_row_and_the_others_go_on(update, monkeypatch):
    calls = []

    def greedy(world: Any, part: Any) -> Any:
        calls.append(part)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB.\nGPU 0 has ...")

    monkeypatch.setitem(work.LOSSES, "materialised", greedy)
    monkeypatch.setattr(update, "TINY", {"tiny": update.TINY["tiny"]})
    here = Here()
    update.run(here)
    (lost,) = [row for row in here.rows if row.get("step") == "materialised"]
    assert lost["out_of_memory"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB."
    assert {row["step"] for row in here.rows if "ms" in row} == {"value", "ours", "responses", "none", update.PADDED}
    assert len(calls) == 1
    assert not [row for row in here.rows if "failed" in row]


def test_padding_takes_the_place_of_an_attention_that_fails(update, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "_fusible", lambda *_: True)
    monkeypatch.setattr(attention, "fused_attention", broken)
    monkeypatch.setattr(update, "TINY", {"tiny": update.TINY["tiny"]})
    here = Here()
    update.run(here)
    assert here.rows[0] == {"what": "the trainer's attention", "failed": "RuntimeError: no kernel image"}
    assert {row["attention"] for row in here.rows[1:]} == {"padded SDPA"}
    assert attention._fusible(torch.zeros(1), torch.zeros(1))  # as it was


def test_a_model_for_which_no_time_is_left_is_not_made(update, monkeypatch):
    here = Here()
    monkeypatch.setattr(here, "left", lambda: update.LEAST_SECONDS - 1)
    update.run(here)
    assert here.rows == [{"what": name, "skipped": NO_TIME} for name in update.TINY]
