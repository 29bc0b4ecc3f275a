"""Links in a run folder: what lies behind them is not a run's to write, on the first start or on a later one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.support.folders import commands, marked, one_line, put, seen
from tests.support.pipelines import Cut, environment, written  # noqa: F401 (a fixture)
from tests.support.runs import Stopper, config, stopped_at, train
from tests.support.small import small_policy
from trainer.cli import program as cli
from trainer.demo.stage import Demo, DemoConfig
from trainer.run import folder as run_folder
from trainer.run.checkpoint import Checkpoints
from trainer.run.stops import Terminated
from trainer.training.session import Session

FILES = [*run_folder.FILES, *(f"not_finite/{name}" for name in run_folder.BATCH)]
PLACES = [*run_folder.MODELS, "not_finite"]


@pytest.fixture
def stopped(here: Path, tmp_path: Path, stopper: Stopper, capfd: Any) -> Path:
    """The folder of a run that the command line began, and that was told to stop."""
    stopper.at = 2
    command = [*commands(here)["sft"], "--steps", "3", "--save-every", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(Terminated):
        cli.main(command)
    stopper.at = None
    capfd.readouterr()
    return tmp_path / "run"


def linked(link: Path, target: Path) -> dict[str, Any]:
    """Puts a link in place of what was there; the folder of the target as it was before."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        shutil.move(link, link.parent.parent / f"kept-{link.name}")
    link.symlink_to(target)
    return seen(target if target.is_dir() else target.parent)


@pytest.mark.parametrize("name", PLACES)
def test_a_run_that_goes_on_writes_over_nobody_s_model(name: str, stopped: Path, tmp_path: Path, capfd: Any) -> None:
    small_policy(7).save(tmp_path / "precious")
    before = linked(stopped / name, tmp_path / "precious")
    assert cli.main(["resume", str(stopped)]) == 2
    one_line(capfd, f"out: {stopped / name} is a link to {tmp_path / 'precious'}, which is not empty")
    assert seen(tmp_path / "precious") == before
    with pytest.raises(ValueError, match=f"out: {stopped / name} is a link"):
        run_folder.claim(stopped, overwrite=True)
    (stopped / name).unlink()
    assert cli.main(["resume", str(stopped)]) == 0


@pytest.mark.parametrize("name", FILES)
def test_nor_into_a_file_behind_a_link(name: str, stopped: Path, tmp_path: Path, capfd: Any) -> None:
    """Some of the links lead to what looks like a run of ours."""
    kept = (stopped / name).read_bytes() if (stopped / name).exists() else b"theirs\n" * 1000
    put(tmp_path / "precious", {"file": ""})
    (tmp_path / "precious" / "file").write_bytes(kept)
    before = linked(stopped / name, tmp_path / "precious" / "file")
    assert cli.main(["resume", str(stopped)]) == 2
    one_line(capfd, f"out: {stopped / name} is a link to {tmp_path / 'precious' / 'file'}")
    with pytest.raises(ValueError, match=f"out: .*({name} is a link|no run of ours .resolved.yaml)"):
        run_folder.claim(stopped, overwrite=True)
    assert seen(tmp_path / "precious") == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["samples.jsonl", "alarms.jsonl", "model", "checkpoints"])
def test_from_python_as_well(name: str, resume: bool, here: Path, tmp_path: Path, stopper: Stopper) -> None:
    cfg = config("sft", here, tmp_path / "run", save_every=1)
    stopped_at(cfg, stopper, 2)
    put(tmp_path / "precious", {"latest.json": "{}", "step-0000009/weights": "theirs", "file": "theirs"})
    target = tmp_path / "precious" / ("file" if "." in name else "")
    before = linked(cfg.out / name, target)
    with pytest.raises(ValueError, match=f"out: {cfg.out / name} is a link"):
        train(cfg, resume=resume)
    assert seen(tmp_path / "precious") == before


@pytest.mark.parametrize("what", ["another run's", "of another program", "a pointer alone", "a file"])
def test_checkpoints_of_others_are_not_taken_over(what: str, stopped: Path, tmp_path: Path, capfd: Any) -> None:
    other = marked(tmp_path / "other") if what == "another run's" else tmp_path / "other"
    target = other / "checkpoints"
    if what == "another run's":
        Checkpoints(other).save("step-0000001", {}, {})
    else:
        there = {"of another program": "checkpoints/step-0000009/weights", "a file": "checkpoints"}
        put(other, {there.get(what, "checkpoints/latest.json"): "{}"})
    linked(stopped / "checkpoints", target)
    before = seen(other)
    assert cli.main(["resume", str(stopped)]) == 2
    one_line(capfd, f"out: {stopped / 'checkpoints'} is a link to {target}")
    with pytest.raises(ValueError, match="checkpoints is a link"):
        run_folder.claim(stopped, overwrite=True)
    assert seen(other) == before


def test_checkpoints_that_were_moved_to_another_disk_go_on(stopped: Path, tmp_path: Path) -> None:
    shutil.move(stopped / "checkpoints", tmp_path / "scratch")
    (stopped / "checkpoints").symlink_to(tmp_path / "scratch")
    assert cli.main(["resume", str(stopped)]) == 0
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_draft_of_the_pointer_is_no_way_out(tmp_path: Path) -> None:
    put(tmp_path, {"precious": "theirs"})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest.json.saving").symlink_to(tmp_path / "precious")
    Checkpoints(tmp_path / "run").save("step-0000001", {}, {})
    assert (tmp_path / "precious").read_text() == "theirs"


@pytest.mark.parametrize("name", ["b/model", "b/samples.jsonl", "b", "samples.jsonl", "resolved.yaml"])
def test_a_pipeline_that_goes_on_looks_at_all_of_them_first(
    name: str, here: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is only read, so its model may lie on another disk."""
    options = {"model": str(here / "base"), "data": str(here / "sft.jsonl"), "steps": 1, "batch_size": 2, "quiet": True}
    stages = {stage: {"stage": "sft", **options} for stage in ("a", "b")}
    out, save = tmp_path / "run", Session.save
    argv = ["pipeline", str(written(tmp_path, stages)), "--out", str(out)]

    def cut(of: Session, *args: Any) -> None:
        if of.cfg.out.name == "b":
            raise Cut
        save(of, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", cut)
        with pytest.raises(Cut):
            cli.main(argv)
    shutil.move(out / "a" / "model", tmp_path / "moved")
    (out / "a" / "model").symlink_to(tmp_path / "moved")
    capfd.readouterr()
    theirs = tmp_path / "precious"
    put(theirs, {"file": "theirs"})
    if name == "resolved.yaml":
        shutil.copy(out / name, theirs / "file")
    target = theirs / "file" if "." in name else theirs
    before = linked(out / name, target)
    for command in (argv, ["resume", str(out)]):
        assert cli.main(command) == 2
        one_line(capfd, f"out: {out / name} is a link to {target}")
    assert seen(theirs) == before
    (out / name).unlink()
    kept = (out / name).parent.parent / f"kept-{Path(name).name}"
    if kept.exists():
        shutil.move(kept, out / name)
    assert cli.main(argv) == 0


@pytest.mark.parametrize("draft", ["saving", "replaced"])
def test_a_draft_of_a_model_is_no_way_out(draft: str, here: Path, tmp_path: Path) -> None:
    small_policy(7).save(tmp_path / "precious")
    out = marked(tmp_path / "run")
    before = linked(out / f".model.{draft}", tmp_path / "precious")
    train(config("sft", here, out, steps=1))
    assert seen(tmp_path / "precious") == before
    assert not (out / "model").is_symlink()


def test_the_demo_writes_through_no_link(tmp_path: Path) -> None:
    put(tmp_path / "precious", {"ranked.jsonl": "theirs"})
    mark = marked(tmp_path / "run") / "resolved.yaml"
    mark.write_text(mark.read_text().replace("stage: sft", "stage: demo"))
    linked(tmp_path / "run" / "data", tmp_path / "precious")
    with pytest.raises(ValueError, match="data is a link to"):
        Demo(DemoConfig(out=tmp_path / "run", quiet=True))


def test_a_stage_on_another_disk_goes_on(here: Path, tmp_path: Path, stopper: Stopper, capfd: Any) -> None:
    """Its folder was an empty one at the start, and is that of our own run when the pipeline goes on."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").symlink_to(tmp_path / "disk")
    options = {
        "model": str(here / "base"),
        "data": str(here / "sft.jsonl"),
        "steps": 3,
        "batch_size": 2,
        "save_every": 1,
    }
    argv = [
        "pipeline",
        str(written(tmp_path, {"a": {"stage": "sft", "save_every": 1, **options}})),
        "--out",
        str(tmp_path / "run"),
    ]
    stopper.at = 2
    with pytest.raises(Terminated):
        cli.main(argv)
    stopper.at = None
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "disk" / "model" / "config.json").is_file()
