"""Run folders: what a run reads is not written over, and what the system says costs one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.support.folders import commands, marked, one_line, seen
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.runs import config, train
from tests.support.small import small_policy, write
from trainer.cli import program as cli
from trainer.evaluation.stage import EvalConfig
from trainer.inspect.command import main as inspect
from trainer.run import folder as run_folder
from trainer.run.log import RunLog
from trainer.stages.split import SplitConfig

# Inputs

BASE, OTHER = "runs/base", "runs/other"
READS: dict[str, Callable[[Path], tuple[dict[str, Any], Path]]] = {
    "the run folder itself": lambda p: ({"model": str(p / BASE)}, p / BASE),
    "its model": lambda p: ({"model": str(p / BASE / "model")}, p / BASE),
    "dots": lambda p: ({"model": str(p / "runs" / ".." / BASE)}, p / "runs" / "x" / ".." / "base"),
    "a link to the folder": lambda p: ({"model": str(p / "link")}, p / BASE),
    "a link for out": lambda p: ({"model": str(p / BASE)}, p / "link"),
    "a link in out": lambda p: ({"model": str(p / "plain")}, p / "linked"),
    "out in the model": lambda p: ({"model": str(p / "plain")}, p / "plain" / "run"),
    "the model in what is written": lambda p: ({"model": str(p / "deep" / "model" / "best")}, p / "deep"),
    "the model among checkpoints": lambda p: ({"model": str(p / "deep" / "checkpoints" / "best")}, p / "deep"),
    "a value model": lambda p: ({"value_model": str(p / OTHER)}, p / OTHER),
    "one reward of several": lambda p: ({"reward": (f"a={p / BASE},{p / OTHER}@0.5", "exact_answer")}, p / OTHER),
    "the first reward": lambda p: ({"reward": str(p / BASE)}, p / BASE),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(
        (f"{BASE}/model", f"{OTHER}/model", "plain", "deep/model/best", "deep/checkpoints/best")
    ):
        small_policy(seed).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / BASE)
    (tmp_path / "runs" / "x").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model").symlink_to("../plain")
    return tmp_path


@pytest.mark.parametrize("name", READS)
def test_an_input_is_not_written_over(name: str, here: Path, models: Path) -> None:
    changes, out = READS[name](models)
    marked(out)
    before = seen(models)
    cfg = config("ppo", here, out, **changes)
    for attempt in (lambda: train(cfg), lambda: run_folder.claim(out, overwrite=True, reads=[cfg])):
        with pytest.raises(ValueError, match=rf"^{next(iter(changes))}: .* is an input, and the run would write"):
            attempt()
    assert seen(models) == before


def test_by_a_relative_name(models: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models / BASE)
    marked(Path())
    for model in ("model", "./model", ".", "../base", "../../link"):
        with pytest.raises(ValueError, match=r"^model: .* is an input"):
            run_folder.refuse_inputs(config("sft", here, Path(), model=model))
    with pytest.raises(ValueError, match=r"^judge: .* is an input"):
        run_folder.refuse_inputs(EvalConfig(model="elsewhere", judge="../base", out=Path()))


def test_what_lies_elsewhere_is_no_trouble(models: Path, here: Path) -> None:
    for out in (models / BASE / "next", models / "runs", models / "new", models / OTHER):
        run_folder.refuse_inputs(config("sft", here, out, model=str(models / BASE)))


def test_the_command_line_says_it_before_anything_is_cleared_away(here: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "run"
    assert cli.main([*commands(here)["sft"], "--out", str(out)]) == 0
    before = seen(out)
    capfd.readouterr()
    argv = [*commands(here)["sft"], "--out", str(out), "--overwrite"]
    assert cli.main([*argv, "--model", str(out)]) == 2
    one_line(capfd, "model: ", "is an input")
    assert cli.main([*argv, "--data", str(out / "metrics.jsonl")]) == 2
    one_line(capfd, "data: ", "is an input")
    assert seen(out) == before


def test_data_is_an_input_too(tmp_path: Path, capfd: Any) -> None:
    rows = [{"prompt": str(i), "response": "x"} for i in range(30)]
    out = marked(tmp_path / "run")
    data = write(out / "train.jsonl", rows)
    (tmp_path / "link.jsonl").symlink_to(data)
    for name in (data, tmp_path / "link.jsonl"):
        with pytest.raises(ValueError, match=r"^data: .* is an input, and a run writes a file of this name"):
            run_folder.refuse_inputs(SplitConfig(data=name, out=out))
    before = data.read_bytes()
    with pytest.raises(ValueError, match=r"--json: .* is the data itself"):
        inspect([str(data), "--no-baselines", "--json", str(tmp_path / "link.jsonl")])
    assert data.read_bytes() == before


# What the system says


@pytest.mark.parametrize("where", ["a file", "in a file", "where nobody may write"])
def test_an_out_that_cannot_be_costs_one_line(where: str, here: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "file").write_text("x")
    out = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "run"}.get(where, Path("/proc/nobody/run"))
    assert cli.main([*commands(here)["sft"], "--out", str(out)]) == 2
    one_line(capfd, "file" if "file" in where else "/proc/nobody")


def test_a_read_only_folder_costs_one_line(
    here: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    assert cli.main([*commands(here)["sft"], "--out", str(tmp_path / "run")]) == 2
    one_line(capfd, "Permission denied", str(tmp_path / "run"))


def test_a_full_disk_names_the_file(here: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "summary", lambda self, _: run_folder and full())
    assert cli.main([*commands(here)["split"], "--out", str(tmp_path / "a")]) == 2
    one_line(capfd, "No space left on device")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main([*commands(here)["split"], "--out", str(tmp_path / "b")]) == 2
    one_line(capfd, "resolved.yaml could not be written: No space left on device")


# Other ranks
