"""Runs that begin from Python: their folder is looked at and marked like that of the command line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.support.folders import THEIRS, commands, put, seen
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.runs import Stopper, config, finished, stopped_at, train
from tests.support.small import lines, small_policy
from trainer.base import config as config_file
from trainer.cli import program as cli
from trainer.evaluation import stage as evaluation
from trainer.inspect import stage as inspect_stage
from trainer.run import folder as run_folder
from trainer.run import mark as run_mark
from trainer.run.log import RunLog
from trainer.stages import sft, split
from trainer.training.defaults import decided

LIKE_OURS = {
    "metrics.jsonl": '{"stage": "sft", "step": 1}\n', "samples.jsonl": "{}\n", "summary.json": "{}",
    "checkpoints/latest.json": "{}", "checkpoints/step-0000001/manifest.json": "{}",
}  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("names", [[name] for name in LIKE_OURS] + [[*LIKE_OURS, "model"], ["model"]], ids="+".join)
def test_a_log_is_no_proof_of_whose_a_folder_is(names: list[str], resume: bool, here: Path, tmp_path: Path) -> None:
    put(tmp_path, {name: LIKE_OURS[name] for name in names if name != "model"})
    if "model" in names:
        small_policy(7).save(tmp_path / "model")
    before = seen(tmp_path)
    with pytest.raises(ValueError, match=f"^out: {tmp_path} holds .* but no run of ours") as caught:
        train(config("sft", here, tmp_path, steps=1), resume=resume)
    assert "\n" not in str(caught.value)
    assert seen(tmp_path) == before


def test_nor_for_a_run_whose_log_is_elsewhere(here: Path, tmp_path: Path) -> None:
    """A log of the caller's own may lie where the model will, and is written on."""
    cfg = config("sft", here, tmp_path / "run", steps=1)
    log = RunLog(cfg.out, quiet=True)
    log.samples("mine", [{"prompt": "p"}])
    sft.sft(cfg, log)  # type: ignore[arg-type]
    assert lines(cfg.out / "samples.jsonl")[0]["title"] == "mine"
    assert run_folder.is_ours(cfg.out)
    small_policy(7).save(tmp_path / "theirs" / "model")
    before = seen(tmp_path / "theirs")
    with pytest.raises(ValueError, match="holds model but no run of ours"):
        sft.sft(dataclasses.replace(cfg, out=tmp_path / "theirs"), log)  # type: ignore[arg-type]
    assert seen(tmp_path / "theirs") == before


@pytest.mark.parametrize("stage", ["split", "eval", "inspect"])
def test_the_other_stages_look_too(stage: str, here: Path, tmp_path: Path) -> None:
    put(tmp_path / "theirs", THEIRS)
    before = seen(tmp_path / "theirs")

    def run(out: Path) -> None:
        if stage == "split":
            split.split(split.SplitConfig(data=here / "sft.jsonl", out=out, quiet=True))
        elif stage == "eval":
            base = str(here / "base")
            evaluation.evaluate(evaluation.EvalConfig(model=base, lm_data=here / "sft.jsonl", out=out, quiet=True))
        else:
            inspect_stage.inspect_data(inspect_stage.InspectConfig(data=here / "ranked.jsonl", out=out, quiet=True))

    with pytest.raises(ValueError, match="no run of ours"):
        run(tmp_path / "theirs")
    assert seen(tmp_path / "theirs") == before
    for _ in range(2):
        run(tmp_path / "run")
    assert config_file.load(tmp_path / "run" / "resolved.yaml")["stage"] == stage


def test_a_split_does_not_write_over_what_it_reads(here: Path, tmp_path: Path) -> None:
    split.split(split.SplitConfig(data=here / "sft.jsonl", out=tmp_path, held_out=0.4, quiet=True))
    before = seen(tmp_path)
    with pytest.raises(ValueError, match=r"^data: .* is an input, and a run writes a file of this name"):
        split.split(split.SplitConfig(data=tmp_path / "train.jsonl", out=tmp_path, held_out=0.4, quiet=True))
    assert seen(tmp_path) == before


def test_the_mark_says_what_the_command_line_would(here: Path, tmp_path: Path) -> None:
    cfg = config("sft", here, tmp_path / "run", model=str(here / "base"), steps=1)
    train(cfg)
    found = config_file.load(cfg.out / "resolved.yaml")
    assert found.pop("stage") == "sft"
    assert found.pop("threads") >= 1
    assert found == config_file.resolved(decided(cfg))
    head = (cfg.out / "resolved.yaml").read_text().splitlines()
    assert head[0].startswith("# begun from Python, rlhf_kernels ")
    assert any(line.startswith("# data: sha256 ") for line in head)


def test_a_notebook_may_train_twice_into_one_folder(here: Path, tmp_path: Path) -> None:
    """The mark follows: it tells of the last run, and stays as it is for the same one."""
    cfg = config("sft", here, tmp_path / "run", steps=1)
    mark = cfg.out / "resolved.yaml"
    train(cfg)
    told = mark.stat().st_mtime_ns
    train(cfg)
    train(dataclasses.replace(cfg, quiet=True, save_every=1), resume=True)
    assert mark.stat().st_mtime_ns == told
    train(dataclasses.replace(cfg, lr=0.5))
    assert config_file.load(mark)["lr"] == 0.5
    train(config("kto", here, cfg.out, steps=1))
    assert config_file.load(mark)["stage"] == "kto"


def test_the_command_line_keeps_its_own_mark(here: Path, tmp_path: Path) -> None:
    assert cli.main([*commands(here)["sft"], "--out", str(tmp_path)]) == 0
    assert (tmp_path / "resolved.yaml").read_text().startswith("# rlhf-train sft ")


def test_the_command_line_goes_on_with_a_run_from_python(here: Path, tmp_path: Path, stopper: Stopper) -> None:
    """Also where an earlier one in the same folder was finished: its summary would say that this one is."""
    cfg = config("sft", here, tmp_path / "run", save_every=1)
    train(cfg := dataclasses.replace(cfg, eval_data=None))  # type: ignore[call-arg]
    whole = finished(cfg.out)["weights"]
    (cfg.out / "metrics.jsonl").unlink()
    stopped_at(cfg, stopper, 2)
    assert not (cfg.out / "summary.json").exists()
    assert cli.main(["resume", str(cfg.out)]) == 0
    assert finished(cfg.out)["weights"] == whole
    assert cli.main([*commands(here)["sft"], "--out", str(cfg.out)]) == 2
    assert cli.main([*commands(here)["sft"], "--out", str(cfg.out), "--overwrite"]) == 0


def test_every_subcommand_is_known_by_its_config() -> None:
    for name, stage in cli.STAGES.items():
        module = __import__(stage.module, fromlist=["_"])
        kind = getattr(module, stage.config)
        assert run_mark.stage_of(kind.__new__(kind)) == name
        theirs: Any = type(stage.config, (), {"__module__": "theirs"})
        assert run_mark.stage_of(theirs()) is None


def test_a_mark_that_was_changed_by_hand_is_written_again(here: Path, tmp_path: Path) -> None:
    train(cfg := config("sft", here, tmp_path / "run", steps=1))
    with (cfg.out / "resolved.yaml").open("a") as file:
        file.write("lr: 3\n")  # It stands twice now.
    train(cfg)
    assert config_file.load(cfg.out / "resolved.yaml")["lr"] == decided(cfg).lr
    assert os.listdir(cfg.out).count("resolved.yaml") == 1


@pytest.mark.parametrize("stage", ["eval", "inspect"])
def test_what_looks_at_a_run_leaves_its_mark(stage: str, here: Path, tmp_path: Path, stopper: Stopper) -> None:
    """The run may go on; and its own model and data may be what is looked at."""
    cfg = config("sft", here, tmp_path / "run", save_every=1, quiet=True)
    stopped_at(cfg, stopper, 2)
    small_policy(7).save(cfg.out / "model")
    before = (cfg.out / "resolved.yaml").read_bytes()
    if stage == "eval":
        model = str(cfg.out / "model")
        evaluation.evaluate(evaluation.EvalConfig(model=model, lm_data=here / "sft.jsonl", out=cfg.out, quiet=True))
    else:
        inspect_stage.inspect_data(inspect_stage.InspectConfig(data=here / "ranked.jsonl", out=cfg.out, quiet=True))
    assert (cfg.out / "resolved.yaml").read_bytes() == before
    (cfg.out / "summary.json").unlink(missing_ok=True)
    assert cli.main(["resume", str(cfg.out)]) == 0
