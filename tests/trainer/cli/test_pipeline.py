"""`rlhf-train pipeline`: one report for all stages; stopped runs go on, and no bit tells."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.support.pipelines import ALLOWED, STAGES, Cut, environment, written  # noqa: F401 (a fixture)
from tests.support.runs import finished, world
from tests.support.small import lines, write
from trainer.cli import pipeline, recipe
from trainer.cli import program as cli
from trainer.data.lines import rows
from trainer.evaluation import stage as evaluation
from trainer.run import folder as run_folder
from trainer.stages import split
from trainer.stages.sft import SFTConfig
from trainer.training.session import Session

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
RESUMED = ("sft", "reward", "ppo", "group")  # stages with checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model and a recipe, and the run of that recipe that nobody disturbed."""
    path = tmp_path_factory.mktemp("pipeline")
    world(path / "world")
    written(path, STAGES)
    assert cli.main(["pipeline", str(path / "recipe.yaml"), "--out", str(path / "whole"), *ALLOWED]) == 0
    return path


def trained(out: Path) -> dict[str, Any]:
    return {name: finished(out / name) for name in RESUMED}


def begun(patch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Where stages begin from now on: their name, their step, and safe points passed since."""
    begin, found = Session._begin, []

    def began(of: Session) -> None:
        begin(of)
        found.append((of.cfg.out.name, of.state.step, of.state.part))

    patch.setattr(Session, "_begin", began)
    return found


def cut_at(patch: pytest.MonkeyPatch, point: int) -> None:
    """The power fails at the n-th safe point of all stages together."""
    tick, seen = Session._tick, []

    def ticked(of: Session, **options: Any) -> None:
        tick(of, **options)
        seen.append(of.name)
        if len(seen) == point:
            raise Cut

    patch.setattr(Session, "_tick", ticked)


def test_one_report_and_one_summary_for_all_stages(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "whole"
    summary = json.loads((out / "summary.json").read_text())
    assert [v["title"].split(":")[0] for v in summary["verdicts"]] == ["after"]
    assert {"facts", "split", "sft", "reward", "ppo", "group", "after"} <= {k.split(":")[0] for k in summary}
    assert summary["split"]["train"] + summary["split"]["held_out"] == 7
    assert [r["stage"] for r in lines(out / "metrics.jsonl")] == ["sft"] * 2 + ["reward"] * 2 + ["ppo", "group"]
    assert {s["title"] for s in lines(out / "samples.jsonl")} >= {"after: Responses", "ppo: Before and after"}
    page = (out / "report.html").read_text()
    for text in ("after: ", "ppo: Before and after", "stage: pipeline", '<span class="c0">sft</span>'):
        assert text in page
    assert all((out / name / "report.html").exists() for name in STAGES)
    assert not list(out.rglob("checkpoints"))
    assert (out / "ppo" / "value" / "model.safetensors").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for argv in (["pipeline", str(place / "recipe.yaml"), "--out", str(out), *ALLOWED], ["resume", str(out), *ALLOWED]):
        assert cli.main(argv) == 0
        assert "holds a finished run" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


# Safe points of a stage: one before its first step and one per step; in the loop of PPO also one per change of a model.
@pytest.mark.parametrize(("point", "again"), [(2, "pipeline"), (5, "resume"), (9, "pipeline")])
def test_a_cut_within_a_stage_changes_no_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int, again: str
) -> None:
    argv = ["pipeline", str(place / "recipe.yaml"), "--out", str(tmp_path / "run"), *ALLOWED]
    with monkeypatch.context() as patch:
        cut_at(patch, point)
        with pytest.raises(Cut):
            cli.main(argv)
    stopped = {2: "sft", 5: "reward", 9: "ppo"}[point]
    done = [name for name in STAGES if (tmp_path / "run" / name / "summary.json").exists()]
    assert done == list(STAGES)[: list(STAGES).index(stopped)]
    first = begun(monkeypatch)
    touched = {p: p.stat().st_mtime_ns for name in done for p in (tmp_path / "run" / name).rglob("*")}
    if again == "resume":
        shutil.move(tmp_path / "run", tmp_path / "moved")
        assert cli.main(["resume", str(tmp_path / "moved"), *ALLOWED]) == 0
    else:
        assert cli.main(argv) == 0
        assert {p: p.stat().st_mtime_ns for name in done for p in (tmp_path / "run" / name).rglob("*")} == touched
    assert first[0] == {2: ("sft", 1, 0), 5: ("reward", 1, 0), 9: ("ppo", 0, 0)}[point]
    assert [name for name, *_ in first] == [name for name in STAGES if name in RESUMED][-len(first) :]
    assert trained(tmp_path / ("moved" if again == "resume" else "run")) == trained(place / "whole")


def test_a_cut_between_stages_changes_no_bit(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the summary of one and before anything of the next; and within one that has no checkpoints."""
    out = tmp_path / "run"
    argv = ["pipeline", str(place / "recipe.yaml"), "--out", str(out), *ALLOWED]

    def fails(*_: Any, **__: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(cli.config_file, "write_resolved", fails)
        with pytest.raises(Cut):
            cli.main(argv)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.cli.pipeline.gather", fails)
        for _ in range(4):  # one stage per life: facts, split, sft, reward
            with pytest.raises(Cut):
                cli.main(argv)
    assert [n for n in STAGES if (out / n / "summary.json").exists()] == ["facts", "split", "sft", "reward"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_show", lambda run_log, *_: (run_log.samples("half", [{"prompt": "x"}]), fails()))
        with pytest.raises(Cut):
            cli.main(argv)
    assert cli.main(argv) == 0
    assert trained(out) == trained(place / "whole")
    assert lines(out / "after" / "samples.jsonl") == lines(place / "whole" / "after" / "samples.jsonl")
    assert lines(out / "samples.jsonl") == lines(place / "whole" / "samples.jsonl")


def test_another_recipe_or_other_data_do_not_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "world", tmp_path / "world")
    few = {name: STAGES[name] for name in ("split", "sft", "reward")}
    argv = ["pipeline", str(written(tmp_path, few)), "--out", str(tmp_path / "run"), *ALLOWED]
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(Cut):
            cli.main(argv)
    capsys.readouterr()
    written(tmp_path, few | {"sft": few["sft"] | {"lr": 0.5, "quiet": False}})
    assert cli.main(argv) == 2
    assert "begun otherwise:\n  sft: lr: auto at the beginning, 0.5 now\nPut back" in capsys.readouterr().err
    written(tmp_path, few | {"group": STAGES["group"]})
    assert cli.main(argv) == 2
    assert "stages: split, sft, reward at the beginning, split, sft, reward, group now" in capsys.readouterr().err
    written(tmp_path, few)
    write(tmp_path / "world" / "ranked.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]}] * 3)
    assert cli.main(argv) == 2
    assert "begun otherwise:\n  reward.data: its contents have changed\nPut back" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite", "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "reward" / "summary.json").read_text())["reward"]["ranked_prompts"] == 3


def rlhf_train(*argv: object) -> subprocess.Popen[bytes]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_random_moments_it_comes_to_the_same(place: Path, tmp_path: Path) -> None:
    source, argv = random.Random(0), ["pipeline", place / "recipe.yaml", "--out", tmp_path / "run", *ALLOWED]
    kills = 0

    def files() -> set[Path]:
        return set((tmp_path / "run").glob("*/*"))

    for _ in range(12):
        process, before = rlhf_train(*argv), files()
        while process.poll() is None and files() == before:  # it is importing, which is not worth a kill
            time.sleep(0.01)
        time.sleep(source.uniform(0.0, 0.5))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 0
    assert rlhf_train(*argv).wait() == 0
    assert trained(tmp_path / "run") == trained(place / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real data is not there")
def test_the_shipped_recipes_on_real_data(tmp_path: Path) -> None:
    """A few steps of each stage; the numbers of the whole recipes are in docs/trainer.md."""
    few = ["steps=3", "reward_steps=2"]
    for name, data, more in (
        ("gsm8k", DATA, ["rl_steps=1"]), ("hh", DATA / "hh_harmless_base.jsonl.gz", ["dpo_steps=2"]),
    ):  # fmt: skip
        settings = [x for setting in (f"data={data}", *few, *more) for x in ("--set", setting)]
        assert cli.main(["pipeline", name, *settings, "--quiet", "--out", str(tmp_path / name)]) == 0
        summary = json.loads((tmp_path / name / run_folder.SUMMARY).read_text())
        assert summary["inspect"]["bag_of_words"]["low"] > 0.5
        assert 0.3 < summary["reward"]["held_out_accuracy"]["value"] < 0.7
        assert (tmp_path / name / run_folder.REPORT).stat().st_size > 20_000
        held_out = [row for _, row in rows(tmp_path / name / "split" / split.HELD_OUT)]
        train = [row for _, row in rows(tmp_path / name / "split" / split.TRAIN)]
        assert len(held_out) + len(train) == (1000 if name == "gsm8k" else 2000)
        assert 0.15 < len(held_out) / (len(held_out) + len(train)) < 0.25


def test_a_pipeline_goes_on_with_the_day_on_which_it_began(tmp_path: Path):
    options = {"data": "d.jsonl", "template_date": "2001-02-03"}
    began = recipe.Recipe(tmp_path, None, [recipe.Step("teach", "sft", options)], {}, {})
    work = pipeline.Work("teach", "sft", None, SFTConfig(data="d.jsonl"))  # type: ignore[arg-type]
    assert pipeline._on_its_day(work, began).config.template_date == "2001-02-03"
    other = pipeline.Work("other", "sft", None, SFTConfig(data="d.jsonl"))  # type: ignore[arg-type]
    assert pipeline._on_its_day(other, began) is other
