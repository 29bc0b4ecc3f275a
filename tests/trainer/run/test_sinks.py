"""Curves elsewhere: a run goes on where it was, tells no secrets, and outlives its sinks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import config, finished, stopped_at, train
from tests.trainer.run.sink_worlds import Fake, crash_after, faked, logged
from trainer.base import ranks
from trainer.base.config import plain
from trainer.cli import program as cli
from trainer.run import sinks
from trainer.run.folder import claim
from trainer.run.sinks import About, Sinks
from trainer.stages.rl.ppo import PPOConfig
from trainer.training.defaults import decided
from trainer.training.session import Session


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return faked(monkeypatch)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_goes_on_where_it_was(
    here: Path, tmp_path: Path, fakes: dict[str, Fake], stopper: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("sft", here, tmp_path / "my run", log_to=(name,), save_every=2)
    crash_after(3, cfg, monkeypatch)
    fake = fakes[name]
    assert fake.logs == logged(cfg.out)
    train(cfg, resume=True)
    assert fake.logs == logged(cfg.out), "each step once, though the third was taken twice"
    first, then = fake.inits
    told = ("project", "name", "config") + (("id", "dir") if name == "wandb" else ())
    assert {k: first[k] for k in told} == {k: then[k] for k in told}
    assert first["project"] == "rlhf-train"
    assert first["config"] == plain(decided(cfg))
    identity = json.loads((cfg.out / "sinks.json").read_text())[name]
    if name == "wandb":
        assert (first["id"], first["name"], first["resume"]) == (identity, "my run", "allow")
        assert first["dir"] == str(cfg.out)
        assert [call for call in fake.calls if call[0] == "finish"] == [
            ("finish", {"exit_code": 1}), ("finish", {"exit_code": 0}),
        ]  # fmt: skip
    else:
        assert first["name"] == f"my run-{identity}"
        assert (first["resume"], then["resume"]) == ("never", "allow")
    claim(cfg.out, overwrite=True)
    train(cfg)
    assert json.loads((cfg.out / "sinks.json").read_text())[name] != identity


def test_the_environment_may_name_the_project(
    tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    (out := tmp_path / "run").mkdir()
    Sinks(["wandb", "trackio"], About(out, {}), pytest.fail).close()
    assert [fake.inits[0]["project"] for fake in fakes.values()] == ["theirs"] * 2
    assert fakes["wandb"].inits[0]["dir"] == "/elsewhere"


def test_no_secret_goes_out(tmp_path: Path, here: Path, fakes: dict[str, Fake], capsys: Any) -> None:
    """Neither as an option, nor on a command line or a screen that W&B would collect by itself."""
    cfg = PPOConfig(
        data=here / "prompts.jsonl", model=str(here / "base"), out=tmp_path / "run", log_to=("wandb", "trackio"),
        reward="https://me:S3CRET@host/score?key=S3CRET&top=${REWARD_TOP}", quiet=True,
    )  # fmt: skip
    with Session(cfg, None, "ppo"):
        pass
    sent = {name: fake.inits for name, fake in fakes.items()}
    assert "S3CRET" not in str(sent)
    assert sent["wandb"][0]["config"]["reward"] == "https://me:***@host/score?key=***&top=${REWARD_TOP}"
    assert sent["wandb"][0]["settings"] == {
        "silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True,
    }  # fmt: skip
    assert "trackio says" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_sink_that_fails_costs_one_warning(
    here: Path, tmp_path: Path, fakes: dict[str, Fake], name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run comes to the end that it has without sinks, bit for bit."""
    alone, cfg = config("sft", here, tmp_path / "alone"), config("sft", here, tmp_path / "run", log_to=(name,))
    train(alone)
    capsys.readouterr()
    if name == "tensorboard":
        write = sinks.TensorBoard._write

        def full(of: sinks.TensorBoard, **fields: Any) -> None:
            if fields.get("step") == 2:
                raise OSError(28, "No space left on device")
            write(of, **fields)

        monkeypatch.setattr(sinks.TensorBoard, "_write", full)
    else:
        fakes[name].broken_at = 2
    train(cfg)
    said = capsys.readouterr().err.splitlines()
    (warned,) = [line for line in said if "log_to" in line]
    assert f"log_to: {name} failed at step 2 of sft" in warned
    assert "S3CRET" not in warned
    assert finished(cfg.out) == finished(alone.out)
    if name != "tensorboard":
        assert [step for _, step in fakes[name].logs] == [1]


def test_one_that_cannot_begin_stops_a_new_run_and_not_an_old_one(
    here: Path, tmp_path: Path, fakes: dict[str, Fake], stopper: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: Any) -> None:
        raise RuntimeError("api_key not configured\nand a long explanation")

    cfg = config("sft", here, tmp_path / "run", log_to=("trackio", "wandb"))
    stopped_at(config("sft", here, tmp_path / "run"), stopper, 2)
    stopper.at = None
    monkeypatch.setattr(fakes["wandb"], "init", refused)
    with pytest.raises(ValueError, match=r"^log_to: wandb could not begin: api_key not configured$"):
        train(config("sft", here, tmp_path / "new", log_to=("trackio", "wandb")))
    assert ("finish", {}) in fakes["trackio"].calls, "what had begun is ended"
    capsys.readouterr()
    train(cfg, resume=True)
    assert "log_to: wandb could not begin (api_key not configured)" in capsys.readouterr().err
    assert [step for _, step in fakes["trackio"].logs] == [3, 4]


def test_a_missing_package_is_told_before_anything_is_done(
    here: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where W&B has left a folder of its name, which Python takes for a package without files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sinks.util, "find_spec", _without("wandb"))
    argv = ["sft", "--data", str(here / "sft.jsonl"), "--model", str(here / "base"), "--out", "run", "--quiet"]
    argv += ["--steps", "1", "--max-length", "32"]
    assert cli.main(argv) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    for name in ("wandb", "trackio"):
        assert cli.main([*argv, "--overwrite", "--log-to", name]) == 2
        told = f"rlhf-train: log_to: the package {name} is missing: pip install {name}\n"
        assert capsys.readouterr().err == told
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"stages:\n  sft:\n    data: {here / 'sft.jsonl'}\n    log_to: [tensorboard, wandb]\n")
    assert cli.main(["pipeline", str(recipe), "--check"]) == 2
    assert "sft: log_to: the package wandb is missing: pip install wandb" in capsys.readouterr().err


def _without(missing: str) -> Any:
    inner = sinks.util.find_spec
    return lambda name, *rest: None if name == missing else inner(name, *rest)


def test_nothing_is_imported_that_nobody_asks_for(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    train(config("sft", here, tmp_path / "run"))


def test_the_first_process_alone_sends(
    here: Path, tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "mine", lambda: 1)
    with Session(config("sft", here, tmp_path / "run", log_to=("wandb", "tensorboard")), None, "sft"):
        pass
    assert fakes["wandb"].inits == []
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_second_run_from_python_is_another_run_elsewhere(here: Path, tmp_path: Path, fakes: dict[str, Fake]) -> None:
    """It takes the place of the first without the command line's clearing away."""
    for _ in range(2):
        train(config("sft", here, tmp_path / "run", log_to=("wandb",), steps=1))
    first, second = fakes["wandb"].inits
    assert first["id"] != second["id"]


def test_one_that_fails_at_its_end_costs_one_warning(
    here: Path, tmp_path: Path, fakes: dict[str, Fake], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(**options: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(fakes["wandb"], "finish", gone)
    train(config("sft", here, tmp_path / "run", log_to=("wandb",), steps=1))
    assert "log_to: wandb failed at its end (nobody answers)" in capsys.readouterr().err


def test_a_run_is_resumed_where_the_package_is_gone(
    here: Path, tmp_path: Path, fakes: dict[str, Fake], stopper: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("sft", here, tmp_path / "run", log_to=("wandb",))
    stopped_at(cfg, stopper, 2)
    stopper.at = None
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sinks.util, "find_spec", _without("wandb"))
    train(cfg, resume=True)
    assert "log_to: wandb could not begin" in capsys.readouterr().err
    assert finished(cfg.out)
