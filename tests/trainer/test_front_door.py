"""The trainer from Python: its names are cheap to have, and a stage is a function of its config."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from tests.support.small import lines, write
from trainer.base.subcommands import STAGES


def test_importing_it_loads_neither_torch_nor_a_stage() -> None:
    code = "import sys, trainer; print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_its_names_are_those_of_the_command_line() -> None:
    """But for the demo, whose room has this name."""
    assert all(getattr(trainer, name) is not None for name in trainer.__all__)
    assert set(trainer.__all__) <= set(dir(trainer))
    for name, stage in STAGES.items():
        if name != "demo":
            assert {stage.config, stage.run} <= set(trainer.__all__), name
            assert dataclasses.is_dataclass(getattr(trainer, stage.config))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        trainer.nothing  # noqa: B018


def test_a_stage_is_a_function_of_its_config(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "a b", "response": "c d"}] * 4)
    cfg = trainer.SFTConfig(data=data, out=tmp_path / "run", steps=2, batch_size=2, quiet=True)
    policy = trainer.sft(cfg)
    again = trainer.load_policy(str(tmp_path / "run"))
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert again.weight.equal(policy.weight)
