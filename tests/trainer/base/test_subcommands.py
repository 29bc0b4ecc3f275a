"""Every subcommand lives where the table says, and takes its own options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from trainer.base.subcommands import SPREAD, STAGES, TOOLS
from trainer.training.options import StageConfig


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_there_and_takes_its_options(name: str) -> None:
    stage = STAGES[name]
    module = importlib.import_module(stage.module)
    config, run = getattr(module, stage.config), getattr(module, stage.run)
    assert dataclasses.is_dataclass(config)
    first = next(iter(inspect.signature(run, eval_str=True).parameters.values()))
    assert issubclass(config, first.annotation)


def test_what_trains_may_be_spread_over_processes() -> None:
    trains = {
        name for name, stage in STAGES.items()
        if issubclass(getattr(importlib.import_module(stage.module), stage.config), StageConfig)
    }  # fmt: skip
    assert set(SPREAD) == trains | {"resume"}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_there(name: str) -> None:
    assert importlib.import_module(TOOLS[name][0])
