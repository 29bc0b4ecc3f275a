"""Event files have the steps and values of metrics.jsonl, through stops too, and lie in folders of the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import config, stopped_at, train
from tests.trainer.run.sink_worlds import Fake, as_points, crash_after, faked, logged, read_back
from trainer.cli import program as cli
from trainer.run.folder import check_folder, claim, refuse_links
from trainer.run.log import RunLog
from trainer.run.sinks import About, Sinks


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return faked(monkeypatch)


def test_tensorboard_has_what_metrics_jsonl_has(here: Path, tmp_path: Path) -> None:
    cfg = config("ppo", here, tmp_path / "run", log_to=("tensorboard",))
    train(cfg)
    points = read_back(cfg.out)
    assert points == as_points(logged(cfg.out))
    assert [step for step, _ in points["objective/kl"]] == [1, 2]
    assert not (cfg.out / "sinks.json").exists()


def test_so_it_has_after_a_stop_and_after_a_crash(
    here: Path, tmp_path: Path, stopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash loses the steps since the checkpoint; they are taken again, and stand there once."""
    stopped = config("sft", here, tmp_path / "stopped", log_to=("tensorboard",))
    stopped_at(stopped, stopper, 2)
    stopper.at = None
    assert set(dict(read_back(stopped.out)["loss"])) == {1, 2}
    train(stopped, resume=True)
    assert read_back(stopped.out) == as_points(logged(stopped.out))

    crashed = config("sft", here, tmp_path / "crashed", log_to=("tensorboard",), save_every=2)
    crash_after(3, crashed, monkeypatch)
    assert set(dict(read_back(crashed.out)["loss"])) == {1, 2, 3}
    train(crashed, resume=True)
    assert read_back(crashed.out) == as_points(logged(crashed.out))
    assert [step for step, _ in read_back(crashed.out)["loss"]] == [1, 2, 3, 4]
    assert len(list((crashed.out / "tensorboard").iterdir())) == 2


def test_what_is_not_finite_is_left_out_and_names_stay(tmp_path: Path) -> None:
    log = RunLog(tmp_path, quiet=True)
    with Sinks(["tensorboard"], About(tmp_path, {}), log.warn) as log.sinks, log.start("sft", 2) as bar:
        bar.step({"policy/approxkl_avg": 0.5, "bad": math.nan, "large": math.inf})
        bar.step({"policy/approxkl_avg": 0.25, "bad": 2.0})
    assert read_back(tmp_path) == {"policy/approxkl_avg": [(1, 0.5), (2, 0.25)], "bad": [(2, 2.0)]}


def test_arms_of_a_run_are_told_apart(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    """Each counts its steps from 1, and W&B does not go back: there each has an axis of its own."""
    log = RunLog(tmp_path / "run", quiet=True)
    about = About(log.out_dir, {"seed": 0}, several=True)
    with Sinks(["tensorboard", "wandb", "trackio"], about, log.warn) as log.sinks:
        for stage in ("ppo", "hack"):
            with log.start(stage, 1) as bar:
                bar.step({"objective/kl": 2.0})
    assert read_back(log.out_dir) == {f"{stage}/objective/kl": [(1, 2.0)] for stage in ("ppo", "hack")}
    assert fakes["trackio"].logs == [({f"{stage}/objective/kl": 2.0}, 1) for stage in ("ppo", "hack")]
    assert fakes["wandb"].logs == [({f"{s}/objective/kl": 2.0, f"{s}/step": 1}, None) for s in ("ppo", "hack")]
    assert fakes["wandb"].calls[:2] == [(f"{s}/*", {"step_metric": f"{s}/step"}) for s in ("ppo", "hack")]


def test_the_command_line_and_a_file_may_ask(here: Path, tmp_path: Path) -> None:
    options = tmp_path / "o.yaml"
    options.write_text(
        f"data: {here / 'sft.jsonl'}\nmodel: {here / 'base'}\nsteps: 2\nmax_length: 32\nquiet: true\n"
        f"log_to: [tensorboard]\nout: {tmp_path / 'run'}\n"
    )
    assert cli.main(["sft", "--config", str(options)]) == 0
    assert read_back(tmp_path / "run") == as_points(logged(tmp_path / "run"))
    assert cli.main(["sft", "--config", str(options), "--overwrite", "--log-to"]) == 0
    assert not list((tmp_path / "run" / "tensorboard").iterdir()), "cleared, and not asked for again"


def test_a_resumed_run_may_ask_for_another(here: Path, tmp_path: Path, stopper: Any) -> None:
    """It has the steps from there on."""
    cfg = config("sft", here, tmp_path / "run")
    stopped_at(cfg, stopper, 2)
    stopper.at = None
    assert cli.main(["resume", str(cfg.out), "--log-to", "tensorboard"]) == 0
    assert read_back(cfg.out) == as_points(logged(cfg.out)[2:])


def test_folders_of_sinks_are_those_of_a_run(here: Path, tmp_path: Path) -> None:
    """What others have there is refused where a run would write it and none began, and stays where one did."""
    for name in ("tensorboard", "wandb"):
        (other := tmp_path / f"other {name}").mkdir()
        (other / name).mkdir()
        (other / name / "file").write_text("precious")
        check_folder(other, reads=[config("sft", here, other)])
        with pytest.raises(ValueError, match=f"holds {name} but no run of ours"):
            check_folder(other, reads=[config("sft", here, other, log_to=(name,))])
    (linked := tmp_path / "linked").mkdir()
    train(config("sft", here, linked, steps=1))
    (linked / "tensorboard").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link to"):
        refuse_links(linked)
    cfg = config("sft", here, tmp_path / "run", log_to=("tensorboard",))
    train(cfg)
    theirs = cfg.out / "tensorboard" / "events.out.tfevents.1.theirs"
    theirs.write_text("precious")
    claim(cfg.out, overwrite=True)
    assert list((cfg.out / "tensorboard").iterdir()) == [theirs]
