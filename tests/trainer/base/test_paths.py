"""Names of files and folders: `~` is a home and no folder of that name, and Python may give a text or a path."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.small import small_policy, write
from trainer.base.typed_options import home
from trainer.cli import program as cli
from trainer.evaluation.stage import EvalConfig
from trainer.stages.rl.grpo import GRPOConfig
from trainer.stages.sft import SFTConfig
from trainer.stages.split import SplitConfig

FEW = ["--steps", "1", "--batch-size", "2", "--quiet"]
ROWS = [{"prompt": "a", "response": "b"}] * 4


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model and data, and another folder in which to work."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    small_policy().save(tmp_path / "home" / "m")
    write(tmp_path / "home" / "d.jsonl", ROWS)
    write(tmp_path / "home" / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    return tmp_path


def test_a_home_is_meant_wherever_a_name_comes_in(here: Path) -> None:
    """Options with and without `=`, a config, a recipe and its variables, and every tool that takes a name."""
    run = ["sft", "--model", "~/m", "--data=~/d.jsonl", "--out=~/a", *FEW]
    assert cli.main(run) == 0
    (here / "home" / "c.yaml").write_text("model: ~/a\ndata: ~/d.jsonl\nout: ~/b\n")
    assert cli.main(["sft", "--config=~/c.yaml", *FEW]) == 0
    (here / "home" / "r.yaml").write_text(
        "vars: {data: ~/p.jsonl}\nstages:\n  look: {stage: inspect, data: '${data}', baselines: false}\n"
        "  reward: {model: ~/b, data: '${data}', eval_data: ~/p.jsonl, steps: 1, batch_size: 2}\n"
    )
    for more in ([], ["--set", "data=~/p.jsonl"]):
        assert cli.main(["pipeline", "~/r.yaml", "--out=~/c", "--quiet", *more]) == 0
    for argv in (
        ["report", "~/a"], ["resume", "~/a"], ["resume", "~/c"],
        ["inspect", "~/d.jsonl", "--json=~/facts.json", "--tokenizer", "~/m"], ["doctor", "--out=~/x"],
    ):  # fmt: skip
        assert cli.main(argv) in ((0, 1) if argv[0] == "doctor" else (0,))
    assert json.loads((here / "home" / "facts.json").read_text())["file"]["path"] == str(here / "home" / "d.jsonl")
    assert {p.name for p in (here / "home").iterdir()} >= {"a", "b", "c"}
    assert list((here / "here").iterdir()) == []


def test_home_itself_is_no_run_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--model", "~/m", "--data", "~/d.jsonl", "--out", "~", *FEW]) == 2
    assert f"out: {here / 'home'} is your home, want a folder for the run alone" in capsys.readouterr().err
    assert list((here / "here").iterdir()) == []


def test_what_is_no_home_stays_as_it_is(here: Path) -> None:
    mine = str(here / "home")
    for word, meant in (
        ("~", mine), ("--out=~", f"--out={mine}"), ("good=~/a,~/b@0.5", f"good={mine}/a,{mine}/b@0.5"),
        ("a~/b", "a~/b"), ("x/~/y", "x/~/y"), ("./~", "./~"), ("~nobody-at-all/x", "~nobody-at-all/x"), ("~1", "~1"),
        ("https://h/~me?x=~/y", "https://h/~me?x=~/y"), ("a=~/r,b=https://h/x?in=~/y", f"a={mine}/r,b=https://h/x?in=~/y"),
    ):  # fmt: skip
        assert home(word) == meant


def test_python_may_name_files_by_texts_and_models_by_paths(here: Path) -> None:
    mine = here / "home"
    config = SFTConfig(model=mine / "m", data="~/d.jsonl", out=str(mine / "o"), eval_data=None)  # type: ignore[arg-type]
    assert config == SFTConfig(model=str(mine / "m"), data=mine / "d.jsonl", out=mine / "o")
    rl = GRPOConfig(data="d", reward=["~/a", Path("b")], probes="~/p", gold_reward=Path("g"))  # type: ignore[arg-type]
    assert (rl.data, rl.reward, rl.probes, rl.gold_reward) == (Path("d"), (f"{mine}/a", "b"), mine / "p", "g")
    judged = EvalConfig(model="~/m", tasks=["~/t", "u"])  # type: ignore[arg-type]
    assert judged.tasks == (mine / "t", Path("u"))
    assert EvalConfig(model="~/m", tasks="~/t").tasks == (mine / "t",)  # type: ignore[arg-type]
    assert judged.model == str(mine / "m")
    with pytest.raises(ValueError, match=r"^data: got 3, want the name of a file or folder$"):
        SplitConfig(data=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^out: got None, want the name of a file or folder$"):
        SplitConfig(data="d", out=None)  # type: ignore[arg-type]


def test_a_folder_named_like_home_keeps_its_meaning(here: Path) -> None:
    """However often a configuration is made of another one."""
    config = SplitConfig(data="d.jsonl", out="./~/o")  # type: ignore[arg-type]
    assert config.out == here / "here" / "~" / "o"
    assert dataclasses.replace(config, seed=1).out == config.out
