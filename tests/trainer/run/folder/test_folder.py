"""Run folders: what is not of a run is never touched, what a run reads is never written over."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.support.folders import THEIRS, commands, marked, one_line, put, seen
from tests.support.pipelines import Cut, environment, written  # noqa: F401 (a fixture)
from tests.support.runs import Stopper, config, stopped_at, train
from tests.support.small import small_policy
from trainer.cli import program as cli
from trainer.demo.stage import FOLDERS, Demo, DemoConfig
from trainer.models.loading import load_policy
from trainer.report import page as report
from trainer.run import folder as run_folder
from trainer.run.checkpoint import Checkpoints

# Folders of others


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("stage", ["sft", "ppo", "split", "eval", "demo"])
def test_a_folder_of_others_is_refused_and_stays(
    stage: str, overwrite: list[str], here: Path, tmp_path: Path, capfd: Any
) -> None:
    put(tmp_path / "theirs", THEIRS)
    before = seen(tmp_path / "theirs")
    assert cli.main([*commands(here)[stage], "--out", str(tmp_path / "theirs"), *overwrite]) == 2
    one_line(capfd, "out: ", "no run of ours")
    assert seen(tmp_path / "theirs") == before


TAKEN = [name for name in THEIRS if name.split("/")[0] in run_folder.NAMES]
FREE = [name for name in THEIRS if name not in TAKEN and name.split("/")[0] not in FOLDERS]
FREE += [
    "notes.txt", "train.log", "slurm-1.out", ".gitkeep", ".DS_Store", ".nfs0001", ".git/HEAD", "lost+found/x",
    ".ipynb_checkpoints/a.ipynb", "adapter_config.json", "resolved.yaml.saving",
]  # fmt: skip


@pytest.mark.parametrize("name", [*TAKEN, "metrics.jsonl.saving", ".model.replaced/model.safetensors"])
def test_what_has_a_name_that_a_run_writes_needs_our_mark(name: str, tmp_path: Path) -> None:
    put(tmp_path, {name: THEIRS.get(name, "x"), "notes.txt": "n"})
    before = seen(tmp_path)
    with pytest.raises(ValueError, match=f"out: .* holds {name.split('/')[0]} but no run of ours"):
        run_folder.claim(tmp_path, overwrite=True)
    assert seen(tmp_path) == before


def test_what_has_another_name_is_nobody_s_business(here: Path, tmp_path: Path) -> None:
    """Nor is an empty folder; all of it stays, also when the run is replaced."""
    out = tmp_path / "run"
    put(out, {name: "theirs" for name in FREE if name != "resolved.yaml.saving"})
    (out / "model").mkdir()
    before = seen(out)
    del before["model"]
    argv = [*commands(here)["sft"], "--out", str(out)]
    for more in ([], ["--overwrite"]):
        assert cli.main([*argv, *more]) == 0
        after = seen(out)
        assert {name: after[name] for name in before} == before
    load_policy(str(out))


@pytest.mark.parametrize("name", FREE)
def test_each_of_them_alone(name: str, tmp_path: Path) -> None:
    put(tmp_path, {name: "x"})
    before = seen(tmp_path)
    assert run_folder.claim(tmp_path) == tmp_path
    assert seen(tmp_path) == before


@pytest.mark.parametrize("name", ["data/prompts.jsonl", "sft/model/model.safetensors"])
def test_the_demo_has_folders_of_its_own(name: str, here: Path, tmp_path: Path, capfd: Any) -> None:
    """In a folder that another stage has marked they are somebody's, and in that of a demo they are ours."""
    put(tmp_path, {name: "theirs"})
    for mark in (False, True):
        out = marked(tmp_path) if mark else tmp_path
        before = seen(out)
        assert cli.main([*commands(here)["demo"], "--out", str(out), "--overwrite"]) == 2
        one_line(capfd, f"out: {out} holds {name.split('/')[0]} but no run of ours", *["of demo"] * mark)
        with pytest.raises(ValueError, match=f"holds {name.split('/')[0]} but no run of ours"):
            Demo(DemoConfig(out=out, quiet=True))
        assert seen(out) == before
    text = (tmp_path / "resolved.yaml").read_text()
    put(tmp_path, {"resolved.yaml": text.replace("stage: sft", "stage: demo")})
    run_folder.check_folder(tmp_path, own=("demo", FOLDERS))


def test_a_demo_goes_over_that_of_an_earlier_version(tmp_path: Path) -> None:
    """It marked its own folder, and not those in it."""
    text = (marked(tmp_path) / "resolved.yaml").read_text()
    put(tmp_path, {"resolved.yaml": text.replace("stage: sft", "stage: demo"), "sft/model/config.json": "{}"})
    Demo(DemoConfig(out=tmp_path, quiet=True, sft_steps=1)).sft()
    assert run_folder.is_ours(tmp_path / "sft")
    assert (tmp_path / "sft" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["", "sft"])
def test_a_pipeline_looks_at_all_its_folders_first(where: str, here: Path, tmp_path: Path, capfd: Any) -> None:
    """The second stage's folder is not ours; of the first, a finished run of ours, nothing is cleared away."""
    out = tmp_path / "run"
    stages = {"split": {"data": str(here / "sft.jsonl"), "quiet": True}, "sft": {"data": str(here / "sft.jsonl")}}
    if where:
        assert cli.main([*commands(here)["split"], "--out", str(out / "split")]) == 0
        marked(out)
    put(out / where, THEIRS)
    capfd.readouterr()
    before = seen(out)
    argv = ["pipeline", str(written(tmp_path, stages)), "--out", str(out), "--overwrite"]
    assert cli.main(argv) == 2
    one_line(capfd, f"out: {out / where} holds")
    assert seen(out) == before


def test_what_others_put_into_ours_survives(here: Path, tmp_path: Path) -> None:
    argv = [*commands(here)["sft"], "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    ours = ("samples", "metrics", "report", "summary", "resolved", "model/model.s", "train.jsonl", "checkpoints/step-")
    theirs = {k: v for k, v in THEIRS.items() if not k.startswith(ours) and k != "checkpoints/latest.json"}
    theirs |= {"notes.txt": "n", "summary.tmp": "s", "resolved.tmp": "r", "model.saving/a": "a", "model/README.md": "c"}
    put(tmp_path / "run", theirs)
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"old")
    assert cli.main([*argv, "--overwrite"]) == 0
    assert {name: (tmp_path / "run" / name).read_text() for name in theirs} == theirs
    load_policy(str(tmp_path / "run"))


def test_a_mark_is_a_whole_one(tmp_path: Path) -> None:
    assert run_folder.is_ours(marked(tmp_path / "ours"))
    whole = (tmp_path / "ours" / "resolved.yaml").read_text()
    for text in ("", whole[: len(whole) // 2], "stage: sft\n", whole.replace("stage", "page"), whole.replace("#", "")):
        put(tmp_path / "theirs", {"resolved.yaml": text})
        assert not run_folder.is_ours(tmp_path / "theirs")


def test_a_caller_s_own_folder_is_looked_at_too(here: Path, tmp_path: Path) -> None:
    """In a notebook `out="."` is soon said, and `./model` there is somebody's."""
    small_policy(7).save(tmp_path / "model")
    cfg = config("sft", here, tmp_path, steps=1)
    with pytest.raises(ValueError, match=f"out: {tmp_path} holds model but no run of ours"):
        train(cfg)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    train(cfg := dataclasses.replace(cfg, out=tmp_path / "run"))
    train(cfg)


def test_the_report_of_others_is_not_written_over(tmp_path: Path, capfd: Any) -> None:
    put(tmp_path, {"metrics.jsonl": '{"stage": "sft", "step": 1, "loss": 1.0}\n', "report.html": "<html>mine</html>"})
    assert cli.main(["report", str(tmp_path)]) == 2
    one_line(capfd, "report.html is there already")
    assert (tmp_path / "report.html").read_text() == "<html>mine</html>"
    (tmp_path / "report.html").unlink()
    for _ in range(2):
        report.write(tmp_path)


# Any moment


def test_a_run_that_died_before_anything_was_there_begins_again(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty folder, with half of the mark, and with the mark alone."""

    def dies(*_: Any, **__: Any) -> None:
        raise Cut

    argv = [*commands(here)["sft"], "--out", str(tmp_path / "run")]
    left = []
    for name in ("trainer.base.config.write_resolved", "pathlib.Path.replace", "trainer.stages.sft.sft"):
        with monkeypatch.context() as patch:
            patch.setattr(name, dies)
            with pytest.raises(Cut):
                cli.main(argv)
        left.append(sorted(p.name for p in (tmp_path / "run").iterdir()))
    assert left == [[], ["resolved.yaml.saving"], ["resolved.yaml"]]
    assert cli.main(argv) == 0


def test_so_does_a_pipeline(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {name: {"stage": "split", "data": str(here / "sft.jsonl"), "quiet": True} for name in ("a", "b")}
    argv = ["pipeline", str(written(tmp_path, stages)), "--out", str(tmp_path / "run")]

    def dies(*_: Any, **__: Any) -> None:
        raise Cut

    for overwrite in ([], ["--overwrite"]):  # a new one, and one in place of another
        for name in ("trainer.cli.pipeline._write", "pathlib.Path.replace", "trainer.cli.pipeline._go"):
            with monkeypatch.context() as patch:
                patch.setattr(name, dies)
                with pytest.raises(Cut):
                    cli.main([*argv, *overwrite])
        assert cli.main([*argv, *overwrite]) == 0
        assert (tmp_path / "run" / "b" / "train.jsonl").exists()


# Links


def test_checkpoints_on_another_disk_stay_there(here: Path, tmp_path: Path, stopper: Stopper) -> None:
    cfg = config("sft", here, tmp_path / "run", save_every=1)
    put(tmp_path / "scratch", {"checkpoint-500/model.safetensors": "theirs", "step-notes/a": "theirs"})
    cfg.out.mkdir()
    (cfg.out / "checkpoints").symlink_to(tmp_path / "scratch")
    theirs = ["checkpoint-500", "step-notes"]
    assert stopped_at(cfg, stopper, 3).names() == ["step-0000002", "step-0000003"]
    assert (tmp_path / "scratch" / "step-0000003").is_dir()
    stopped_at(cfg, stopper, 1)  # a new run in the same folder
    assert sorted(p.name for p in (tmp_path / "scratch").iterdir()) == [
        *theirs[:1],
        "latest.json",
        "step-0000001",
        *theirs[1:],
    ]
    train(cfg, resume=True)
    assert sorted(p.name for p in (tmp_path / "scratch").iterdir()) == theirs
    assert os.readlink(cfg.out / "checkpoints") == str(tmp_path / "scratch")
    assert (tmp_path / "scratch" / "step-notes" / "a").read_text() == "theirs"


def test_overwriting_keeps_the_link(here: Path, tmp_path: Path) -> None:
    out = marked(tmp_path / "run")
    put(tmp_path / "scratch", {"checkpoint-500/manifest.json": "{}"})
    (out / "checkpoints").symlink_to(tmp_path / "scratch")
    assert not run_folder.has_checkpoints(out), "those of another program"
    Checkpoints(out).save("step-0000001", {}, {})
    assert run_folder.has_checkpoints(out)
    assert cli.main([*commands(here)["sft"], "--out", str(out), "--overwrite"]) == 0
    assert (out / "checkpoints").is_symlink()
    assert [p.name for p in (tmp_path / "scratch").iterdir()] == ["checkpoint-500"]


def test_a_link_to_a_model_that_is_there_is_refused(here: Path, tmp_path: Path, capfd: Any) -> None:
    """It may be anybody's; an empty folder behind it is used, and the link stays."""
    out, elsewhere = marked(tmp_path / "run"), tmp_path / "elsewhere"
    small_policy().save(elsewhere)
    (out / "model").symlink_to(elsewhere)
    before, argv = seen(elsewhere), [*commands(here)["sft"], "--out", str(out), "--overwrite"]
    assert cli.main(argv) == 2
    one_line(capfd, "out: ", "is a link to", "which is not empty")
    assert seen(elsewhere) == before
    shutil.rmtree(elsewhere)
    assert cli.main(argv) == 0
    assert os.readlink(out / "model") == str(elsewhere)
    load_policy(str(elsewhere))


def test_a_disk_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "later")
    found = Checkpoints(tmp_path)
    assert found.names() == []
    found.save("step-0000001", {}, {"x": {"a": torch.ones(1)}})
    assert (tmp_path / "later" / "step-0000001").is_dir()
