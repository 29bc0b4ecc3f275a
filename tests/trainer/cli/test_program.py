"""The command line: options, recipes, threads, exit codes; and the log that a run leaves behind."""

from __future__ import annotations

import json
import os
import runpy
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro")

import torch

from tests.support.small import write
from trainer.base import config as config_file
from trainer.cli import program as cli
from trainer.run.log import RunLog

yaml = pytest.importorskip("yaml")


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A stage's options."""

    out: Path
    data: Path | None = None
    model: str = "tiny"
    lr: float = 1e-3
    steps: int = 3
    clip: tuple[float, float] = (0.2, 0.2)
    shuffle: bool = True


@pytest.fixture
def toy(monkeypatch):
    """`rlhf-train toy`, whose behaviour a test may replace through `toy.run`; seen configs are in `toy.seen`."""
    module = types.ModuleType("toy_stage")
    module.seen = []

    def run(cfg: ToyConfig) -> None:
        module.seen.append(cfg)
        log = RunLog(cfg.out, quiet=True)
        with log.start("toy", cfg.steps) as bar:
            for step in range(cfg.steps):
                bar.step({"loss": 1.0 / (step + 1)})
        log.summary({"toy": {"loss": 0.5}})

    module.ToyConfig, module.run = ToyConfig, run
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(cli.STAGES, "toy", cli.Stage("toy_stage", "ToyConfig", "run", "a toy"))
    # The command line writes to the environment; with these the test's own comes back afterwards.
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "1000"))
    return module


def test_a_run_leaves_everything_in_its_folder(toy, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text("x\n")
    out = tmp_path / "run"
    assert cli.main(["toy", "--out", str(out), "--data", str(data), "--lr", "0.5"]) == 0
    assert {p.name for p in out.iterdir()} == {"metrics.jsonl", "summary.json", "report.html", "resolved.yaml"}
    text = (out / "resolved.yaml").read_text()
    assert "rlhf-train toy --out" in text
    assert "data: sha256 73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac" in text
    assert yaml.safe_load(text)["lr"] == 0.5
    assert "report.html" in capsys.readouterr().out


def test_resolved_yaml_runs_again(toy, tmp_path):
    assert cli.main(["toy", "--out", str(tmp_path / "a"), "--lr", "1e-5", "--clip", "0.1", "0.3", "--no-shuffle"]) == 0
    assert cli.main(["toy", "--config", str(tmp_path / "a" / "resolved.yaml"), "--out", str(tmp_path / "b")]) == 0
    first, second = toy.seen
    assert (second.lr, second.clip, second.shuffle, second.data) == (1e-5, (0.1, 0.3), False, None)
    assert second.steps == first.steps
    assert second.out == tmp_path / "b"


def test_flags_win_over_the_recipe(toy, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\nlr: 1e-4\nsteps: 2\nthreads: 1\n")
    assert cli.main(["toy", "--config", str(recipe), "--steps=5"]) == 0
    assert (toy.seen[0].lr, toy.seen[0].steps) == (1e-4, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "unknown option 'learning_rat'; want one of clip, data, lr"),
        ("step: 1\n", "unknown option 'step'; did you mean 'steps'?"),
        ("lr: {a: 1}\n", "'lr' must be a plain value"),
        ("- lr\n", "must hold `option: value` lines, got a list"),
        ("lr: [1\n", "is not valid YAML"),
        ("threads: many\n", "threads: got 'many', want a positive integer"),
    ],
)
def test_bad_recipes_are_explained(toy, tmp_path, capsys, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    assert cli.main(["toy", "--config", str(recipe), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not toy.seen


def test_mistakes_cost_one_line(toy, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    for argv, message in (
        (["toi"], "rlhf-train: unknown command 'toi'; did you mean 'toy'?"),
        (["toy", *out, "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["toy", *out, "--threads", "0"], "threads: got 0"),
        (["toy", *out, "--data", str(tmp_path / "none.jsonl")], "none.jsonl does not exist"),
    ):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", *out, "--lr", "fast"])
    assert stop.value.code == 2
    assert not toy.seen


def test_only_our_own_errors_lose_their_traceback(toy, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    toy.run = lambda cfg: RunLog(cfg.out, quiet=True).start("toy", 0)
    assert cli.main(["toy", *out]) == 2
    assert "total_steps: got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="total_steps"):
        cli.main(["toy", *out, "--traceback"])
    toy.run = lambda cfg: json.loads("{")
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main(["toy", *out])


def test_interruption_of_the_first_imports(monkeypatch):
    class Interrupts:
        def find_spec(self, name, *_):
            if name == "trainer.cli.program":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "trainer.cli.program")
    monkeypatch.delattr(sys.modules["trainer"], "cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("trainer", run_name="__main__")
    assert stop.value.code == 130


def test_interruption_and_missing_packages(toy, tmp_path, capsys, monkeypatch):
    def interrupt(cfg):
        raise KeyboardInterrupt

    toy.run = interrupt
    assert cli.main(["toy", "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["toy", "--out", str(tmp_path / "run")]) == 2
    assert 'tyro is missing: pip install "rlhf_kernels[train]"' in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_by_accident(toy, tmp_path, capsys):
    argv = ["toy", "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    assert cli.main(argv) == 2
    assert "holds a finished run; pass --overwrite" in capsys.readouterr().err
    model = tmp_path / "run" / "model.safetensors"
    model.write_text("weights")
    assert cli.main([*argv, "--overwrite", "--data", str(tmp_path / "typo.jsonl")]) == 2
    assert (tmp_path / "run" / "summary.json").exists()
    assert cli.main([*argv, "--overwrite", "--steps", "2"]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert model.exists()


def test_a_stage_without_a_summary_still_finishes(toy, tmp_path):
    toy.run = lambda cfg: RunLog(cfg.out, quiet=True).samples("s", [{"prompt": "p"}])
    argv = ["toy", "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stage"] == "toy"
    assert cli.main(argv) == 2


def test_an_interrupted_run_starts_afresh(toy, tmp_path):
    out = tmp_path / "run"
    config_file.write_resolved(out, ToyConfig(out=out), [cli.version()], {"stage": "toy"})
    (out / "metrics.jsonl").write_text('{"stage": "toy", "step": 1, "loss": 9}\n')
    assert cli.main(["toy", "--out", str(out)]) == 0
    assert "9" not in (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("where", ["a CPU", "a GPU", "Python"])
def test_out_of_memory_says_what_needs_less(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: Any, **options: Any) -> None:
        if where == "a CPU":
            torch.empty(2**60, dtype=torch.int8)
        raise MemoryError if where == "Python" else torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore.")

    monkeypatch.setattr("trainer.stages.sft.sft", train)
    write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}])
    argv = ["sft", "--model", "tiny", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-2].startswith("rlhf-train: out of memory: ")
    assert "--max-tokens" in told[-1]
    monkeypatch.setattr("trainer.stages.sft.sft", lambda *args, **options: torch.ones(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        cli.main([*argv, "--overwrite"])
