"""Stages of the suite that a test makes up."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.context import Context
from benchmarks.gpu.record import Record

FAR = 3600.0  # seconds: no stage of a test meets a deadline by accident


@pytest.fixture
def staged(monkeypatch, tmp_path) -> Callable[..., dict[str, Any]]:
    """Runs these functions as stages, dry; returns what the JSON holds."""

    def run(seconds: float = FAR, old: Path | None = None, code: int = 0, **stages: Callable[[Context], None]):
        for name, function in stages.items():
            module = ModuleType(name)
            module.run = function  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, f"benchmarks.gpu.stages.{name}", module)
        monkeypatch.setattr(runner, "STAGES", dict.fromkeys(stages, (1, 1)))
        folder = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        assert runner.work(folder, list(stages), time.time() + seconds, True, old) == code
        return Record(folder).content | {"folder": folder}

    return run
