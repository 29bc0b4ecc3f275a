"""Run folders: what is not of a run is never touched, what a run reads is never written over."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.fault_worlds import Stopper, config, stopped_at, train, world
from tests.pipeline_worlds import Cut, environment, written  # noqa: F401 (a fixture)
from tests.trainer_worlds import small_policy, write
from trainer import cli, ranks, report, run_folder
from trainer.checkpoint import Checkpoints
from trainer.evaluation import EvalConfig
from trainer.guard import save_batch
from trainer.inspect_data import main as inspect
from trainer.log import RunLog
from trainer.models import load_policy
from trainer.session import Session
from trainer.split import SplitConfig

THEIRS = {
    "checkpoint-500/model.safetensors": "weights", "checkpoints/checkpoint-500/model.safetensors": "weights",
    "checkpoints/step-0000002/state.json": "{}", "checkpoints/latest.json": "{}", "model/precious.bin": "weights",
    "model/model.safetensors": "weights", "model.old/model.safetensors": "weights", "value/notes.txt": "notes",
    "samples.jsonl": '{"a": 1}\n', "metrics.jsonl": '{"step": 1}\n', "report.html": "<html>mine</html>",
    "summary.json": "{}", "not_finite/a.txt": "a", "resolved.yaml": "# of another program\nstage: sft\nlr: 1\n",
    "train.jsonl": "{}", "data/prompts.jsonl": "{}", "sft/model/model.safetensors": "weights",
}  # fmt: skip
"""What other trainers, and people, leave behind, under names that are ours too."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders")
    world(path / "world")
    return path / "world"


@pytest.fixture
def stopper(monkeypatch: pytest.MonkeyPatch) -> Stopper:
    return Stopper(monkeypatch)


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def seen(folder: Path) -> dict[str, Any]:
    """Every file and folder, with its bytes and the time of its last change."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
    }


def commands(here: Path) -> dict[str, list[str]]:
    model, few = ["--model", str(here / "base")], ["--steps", "1", "--batch-size", "2", "--quiet"]
    return {
        "sft": ["sft", *model, "--data", str(here / "sft.jsonl"), *few],
        "ppo": ["ppo", *model, "--data", str(here / "prompts.jsonl"), "--reward", "exact_answer", *few],
        "split": ["split", "--data", str(here / "sft.jsonl"), "--quiet"],
        "eval": ["eval", *model, "--lm-data", str(here / "sft.jsonl"), "--quiet"],
        "demo": ["demo", "--sft-steps", "1", "--quiet"],
    }


def one_line(capfd: Any, *words: str) -> None:
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    for word in ("rlhf-train: ", *words):
        assert word in said, said


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


@pytest.mark.parametrize("name", [*THEIRS, "log.txt", ".git/HEAD", "adapter_config.json"])
def test_whatever_lies_in_it(name: str, tmp_path: Path) -> None:
    put(tmp_path, {name: THEIRS.get(name, "x")})
    before = seen(tmp_path)
    with pytest.raises(ValueError, match=f"out: .* holds {name.split('/')[0]} but no run of ours"):
        run_folder.claim(tmp_path, overwrite=True)
    assert seen(tmp_path) == before


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


def marked(out: Path) -> Path:
    """A folder in which a run of ours began, and did nothing."""
    text = f"# rlhf-train sft\n# {cli.version()}\nstage: sft\n"
    put(out, {"resolved.yaml": text})
    return out


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


def test_a_bad_batch_is_left_among_their_files(tmp_path: Path) -> None:
    put(tmp_path / "not_finite", {"notes.txt": "mine", "about.json": "old"})
    for step in (1, 2):
        save_batch(tmp_path / "not_finite", [], {"step": step})
        assert f'"step": {step}' in (tmp_path / "not_finite" / "about.json").read_text()
    assert (tmp_path / "not_finite" / "notes.txt").read_text() == "mine"


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
    with pytest.raises(ValueError, match=f"out: {tmp_path / 'model'} is there already, and of no run of ours"):
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
    for name in ("trainer.config_file.write_resolved", "pathlib.Path.replace", "trainer.sft.train"):
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
        for name in ("trainer.pipeline._write", "pathlib.Path.replace", "trainer.pipeline._go"):
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
    one_line(capfd, "summary.json could not be written: No space left on device")


# Other ranks


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.skipif(ranks.fcntl is None, reason="there are no locks")
def test_what_a_killed_rank_left_goes_with_the_next_start(temporary: Path, here: Path) -> None:
    names = {name: f"rlhf-train-rank-{name}" for name in ("deadbeef", "alive___", "young___", "mine", "linked__")}
    for name in (*names.values(), "rlhf-train-notes"):
        put(temporary / name, {"run/metrics.jsonl": "x"})
    shutil.rmtree(temporary / names["linked__"])
    (temporary / names["linked__"]).symlink_to(here)
    held, old = ranks._locked(temporary / names["alive___"]), time.time() - 3600
    for name in os.listdir(temporary):
        if name != names["young___"]:
            os.utime(temporary / name, (old, old))
    assert held is not None
    cfg = config("sft", here, temporary / "run")
    assert ranks.placed(cfg) is cfg
    assert sorted(os.listdir(temporary)) == sorted({*names.values(), "rlhf-train-notes"} - {names["deadbeef"]})
    os.close(held)
    ranks.placed(cfg)
    assert names["alive___"] not in os.listdir(temporary)
    assert (here / "sft.jsonl").exists()


def test_a_rank_locks_its_folder_and_copies_no_weights(
    temporary: Path, here: Path, tmp_path: Path, stopper: Stopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("sft", here, tmp_path / "run", save_every=1)
    stopped_at(cfg, stopper, 2)
    small_policy().save(cfg.out / "model")
    monkeypatch.setattr("atexit.register", lambda *_, **__: None)
    mine = ranks._own_folder()
    assert ranks._locked(mine.parent) is None, "it is held already"
    ranks._look_into(cfg.out, mine)
    assert sorted(p.name for p in mine.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert Checkpoints(mine).latest(print) is not None
    monkeypatch.setattr(ranks, "mine", lambda: 1)
    with Session(dataclasses.replace(cfg, out=mine), None, "sft"):
        pass
    assert Checkpoints(cfg.out).names() == ["step-0000001", "step-0000002"], "they are the first rank's"
