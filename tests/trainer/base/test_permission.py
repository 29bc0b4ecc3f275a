"""Recipes and run folders of others: no code of theirs runs unseen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")

import yaml

from tests.support.foreign import THEIRS, Place, made  # noqa: F401 (a fixture)
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from trainer.base import permission
from trainer.cli import pipeline
from trainer.cli import program as cli
from trainer.run import fingerprint
from trainer.stages.rl.grpo import GRPOConfig

FAILS_ONCE = """
n = pathlib.Path("n")
def g(p, r, e):
    n.write_text(n.read_text() + "." if n.exists() else ".")
    return [1 / (len(n.read_text()) != 2)] * len(r)
"""
CODE = [
    "theirs:f",
    "compare:theirs:f",
    "a=theirs:f@0.5",
    "pack.inner.deep:f",
    "exact_answer,theirs:f",
    "trainer.demo.task:judge",
]
PYTHONS = ["pty:spawn", "os:system", "os.path:join", "subprocess:run", "builtins:exec", "compare:shutil:rmtree"]


@pytest.mark.parametrize("reward", [*CODE, *PYTHONS])
def test_a_function_in_a_file_needs_a_word_on_the_command_line(place: Place, capsys: Any, reward: str) -> None:
    """In a recipe, checked or run; in a config; and in a run folder, as resolved.yaml of a stage or of a pipeline."""
    recipe, config = place.recipe(reward=reward), place.config(reward=reward)
    stage, whole = place.path / "stage", place.path / "whole"
    for folder, text in ((stage, "stage: grpo\n" + Path(config).read_text()), (whole, Path(recipe).read_text())):
        folder.mkdir()
        (folder / "resolved.yaml").write_text(text + ("stage: pipeline\n" if folder == whole else ""))
    wanted = "is Python's own" if reward in PYTHONS else "lets it run"
    for argv in (
        ["pipeline", recipe, "--check"],
        ["pipeline", recipe, "--out", str(place.out)],
        ["grpo", "--config", config, "--out", str(place.out)],
        ["resume", str(stage)],
        ["resume", str(whole)],
    ):
        assert cli.main(argv) == 2, argv
        said = capsys.readouterr().err
        assert wanted in said
        assert said.count("\n") == 1
        assert not place.ran.exists()
    assert not place.out.exists()
    assert {p.name for p in [*stage.iterdir(), *whole.iterdir()]} == {"resolved.yaml"}


def test_the_line_says_which_word(place: Place, capsys: Any) -> None:
    assert cli.main(["pipeline", place.recipe(reward="pack.inner.deep:f"), "--check"]) == 2
    assert capsys.readouterr().err == (
        f"rlhf-train: {place.path}/r.yaml: grpo: reward: got 'pack.inner.deep:f', which is Python code of a module "
        "that the command line does not name; --allow-code pack.inner.deep lets it run\n"
    )


@pytest.mark.parametrize("option", ["gold_reward", "judge"])
def test_so_does_every_other_option_that_takes_functions(place: Place, capsys: Any, option: str) -> None:
    if option == "judge":
        stage = {
            "stage": "eval",
            "model": "tiny",
            "base": "tiny",
            "data": str(place.path / "d.jsonl"),
            "judge": "theirs:f",
        }
        Path(recipe := str(place.path / "r.yaml")).write_text(yaml.safe_dump({"stages": {"eval": stage}}))
    else:
        recipe = place.recipe(reward="exact_answer", gold_reward="theirs:f")
    assert cli.main(["pipeline", recipe, "--out", str(place.out)]) == 2
    assert f"{option}: got 'theirs:f', which is Python code" in capsys.readouterr().err
    assert not place.ran.exists()


@pytest.mark.parametrize(
    ("text", "defined"),
    [
        ("def f(): pass", True), ("class f: pass", True), ("f = 1", True), ("from x import y as f", True),
        ("try:\n  import f\nexcept ImportError:\n  pass", True), ("if x:\n  def f(): pass", True), ("f: int = 1", True),
        ("from x import *", True), ("def __getattr__(n): pass", True), ("async def f(): pass", True),
        ("def g():\n  f = 1", False), ("print(f)", False), ("class g:\n  f = 1", False), ("", False),
        ("# coding: latin-1\nf = '\xe9'", True),
    ],
)  # fmt: skip
def test_what_a_module_defines_is_read_off_it(tmp_path: Path, text: str, defined: bool) -> None:
    (tmp_path / "m.py").write_bytes(text.encode("latin-1"))
    assert permission._defines(tmp_path / "m.py", "f") is defined
    (tmp_path / "m.py").write_bytes(text.encode("latin-1") + b"\n(")
    with pytest.raises(ValueError, match=r"m\.py cannot be read as Python"):
        permission._defines(tmp_path / "m.py", "f")


def test_who_names_a_module_may_use_it(place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line itself, or as an allowed one, and what is in it. It is imported before any work."""
    monkeypatch.setattr(cli, "_train_alone", lambda *_, **__: 0)
    monkeypatch.setattr(pipeline, "_go", lambda *_: None)
    out = ["--out", str(place.out), "--overwrite"]
    config, recipe = place.config(reward="pack.inner.deep:f"), place.recipe(reward="${which}")
    Path(recipe).write_text("vars: {which: exact_answer}\n" + Path(recipe).read_text())
    for argv in (
        ["grpo", "--config", config, "--reward", "theirs:f", *out],
        ["grpo", "--config", config, "--reward=a=theirs:f@0.5", *out],
        ["grpo", "--config", config, "--allow-code", "pack", *out],
        ["grpo", "--config", config, "--allow-code=pack.inner.deep:f", *out],
        ["pipeline", recipe, "--set", "which=theirs:f", *out],
        ["pipeline", recipe, "--set=which=pack.inner:f", *out],
    ):
        place.ran.unlink(missing_ok=True)
        for name in [m for m in sys.modules if m.split(".")[0] in ("theirs", "pack")]:
            del sys.modules[name]
        assert cli.main(argv) == 0, argv
        assert place.ran.exists()
    for word in ("pac", "pack.inner.deeper", "inner.deep", "deep"):
        assert cli.main(["grpo", "--config", config, "--allow-code", word, *out]) == 2
        assert "--allow-code pack.inner.deep lets it run" in capsys.readouterr().err


def test_names_of_files_and_folders_are_no_words(place: Place, capsys: Any) -> None:
    """A folder of others may be called like a function of theirs."""
    (place.path / "theirs:f").mkdir()
    (place.path / "theirs:f" / "resolved.yaml").write_text(
        "stage: grpo\n" + Path(place.config(reward="theirs:f")).read_text()
    )
    for argv in (
        ["resume", "theirs:f"],
        ["grpo", "--config", place.config(reward="theirs:f"), "--out", "theirs:f", "--overwrite"],
        ["pipeline", place.recipe(reward="theirs:f"), "--out", "theirs:f", "--overwrite"],
    ):
        assert cli.main(argv) == 2
        assert "--allow-code theirs lets it run" in capsys.readouterr().err
    assert not place.ran.exists()


def test_a_run_that_stops_says_how_to_go_on(place: Place, capsys: Any) -> None:
    """With the word in it, so that one's own run is a matter of copying a line."""
    (place.path / "theirs.py").write_text(THEIRS.format(ran=str(place.ran)) + FAILS_ONCE)
    for argv in (
        ["grpo", "--config", place.config(reward="exact_answer", steps=2, save_every=1), "--reward", "theirs:g"],
        ["pipeline", place.recipe(reward="theirs:g", steps=2, save_every=1), "--allow-code", "theirs"],
    ):
        (place.path / "n").unlink(missing_ok=True)
        assert cli.main([*argv, "--out", str(place.out), "--overwrite"]) == 2
        line = next(x for x in capsys.readouterr().err.splitlines() if "go on with" in x)
        assert line == f"rlhf-train: go on with: rlhf-train resume {place.out} --allow-code theirs"
        assert cli.main(["resume", str(place.out)]) == 2
        assert "--allow-code theirs lets it run" in capsys.readouterr().err
        assert cli.main(line.split()[5:]) == 0


def test_python_callers_have_named_their_modules(place: Place) -> None:
    """And the command line leaves nothing behind."""
    assert cli.main(["pipeline", place.recipe(reward="theirs:f"), "--check"]) == 2
    assert permission.function("theirs:f") == ("theirs", "f")
    config = GRPOConfig(data=place.path / "d.jsonl", reward=("theirs:f", "x=pack.inner.deep:f@2"), out=place.out)
    found = fingerprint.inputs(config)
    assert {"reward (theirs:f)", "reward (pack.inner.deep:f)"} <= found.keys()
    assert not place.ran.exists()


def test_the_folder_of_a_command_is_looked_into_for_functions_only(place: Place) -> None:
    """A folder of others may hold files that are called like what somebody else would import: peft.py, say."""
    assert cli.main(["pipeline", place.recipe(reward="exact_answer"), "--check"]) == 0
    assert str(place.path) not in sys.path
    assert cli.main(["pipeline", place.recipe(reward="theirs:f"), "--check", "--allow-code", "theirs"]) == 0
    assert sys.path[-1] == str(place.path)


def test_check_reads_and_imports_nothing_even_where_it_may(place: Place, capsys: Any) -> None:
    for reward in ("theirs:f", "pack.inner.deep:f", "compare:pack:f"):
        allow = ["--allow-code", "theirs", "--allow-code=pack"]
        assert cli.main(["pipeline", place.recipe(reward=reward), "--check", *allow]) == 0
        assert "nothing wrong with grpo" in capsys.readouterr().out
    for reward, message in (
        ("theirs:g", f"{place.path}/theirs.py defines no g"),
        ("theirs.f:f", "there is no module theirs.f"),
        ("nowhere:f", "there is no module nowhere"),
        ("pack.other:f", "there is no module pack.other"),
    ):
        allow = ["--allow-code", reward.split(":")[0]]
        assert cli.main(["pipeline", place.recipe(reward=reward), "--check", *allow]) == 2
        assert message in capsys.readouterr().err
    assert not place.ran.exists()
    assert not {"theirs", "pack"} & set(sys.modules)
