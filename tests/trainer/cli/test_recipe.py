"""Recipes: what is wrong with one is told before any work, the shipped ones are whole, and the docs are true."""

from __future__ import annotations

import gzip
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.support.pipelines import ALLOWED, Cut, environment, written  # noqa: F401 (a fixture)
from trainer.cli import program as cli
from trainer.cli import recipe

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {sft: {}, sft: {}}\n", "'sft' stands twice, the second time in line 1"),
        ("stages:\n  sft:\n    lr: 1\n    lr: 2\n", "'lr' stands twice, the second time in line 4"),
        ("stages: {}\n", "stages: got none"),
        ("stages: [sft]\n", "stages: want `name: value` lines, got ['sft']"),
        ("sft: {}\n", "is no recipe of several stages"),
        ("stages: {sft: {}}\nvar: {}\n", "unknown option 'var'; did you mean 'vars'?"),
        ("stages: {sft: [\n", "is not valid YAML"),
        (
            "vars: {data: }\nstages: {sft: {data: '${data}'}}\n",
            "variable data has no value; give it one with --set",
        ),
        ("threads: 0\nstages: {sft: {data: x}}\n", "threads: got 0"),
    ],
)
def test_bad_yaml_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert cli.main(["pipeline", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_mistakes_on_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(place / "recipe.yaml"), ["--out", str(tmp_path / "run")]
    for argv, message in (
        (["gsm8"], "gsm8 does not exist; did you mean gsm8k?"),
        (["whatever"], "want a file, or one of gsm8k, hh"),
        ([path, "--set", "word=1"], "--set: unknown option 'word'; did you mean 'world'?"),
        ([path, "--set", "world"], "--set: got 'world', want NAME=VALUE"),
        ([path, "--set", f"world={tmp_path}"], "ranked.jsonl does not exist"),
    ):
        assert cli.main(["pipeline", *argv, *out]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # what an option may hold is tyro's to say; which stage it was, ours
        cli.main(["pipeline", str(written(tmp_path, {"sft": {"data": "x", "steps": "many"}})), *out])
    assert "this is about the stage sft of" in capsys.readouterr().err
    assert cli.main(["pipeline", path, "--check", *out, *ALLOWED]) == 0
    assert "nothing wrong with facts, split, sft" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_shipped_recipes_are_whole(tmp_path: Path) -> None:
    """Every option exists, every reference leads somewhere: with the right files nothing is refused."""
    assert recipe.names() == ["gsm8k", "hh"]
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "answer": "#### 4"}
    for name in ("gsm8k_train", "gsm8k_test", "gsm8k_ranked", "hh_harmless_base"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair).encode()))
    for name, data in {"gsm8k": tmp_path, "hh": tmp_path / "hh_harmless_base.jsonl.gz"}.items():
        assert cli.main(["pipeline", name, "--set", f"data={data}", "--check"]) == 0
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "recipes/*.yaml" in found["trainer"]


COMMANDS = [
    shlex.split(line)[1:]
    for line in (ROOT / "docs" / "trainer.md").read_text().splitlines()
    if line.startswith("    rlhf-train ")
]


def test_commands_in_the_docs_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one names a stage and options that there are; and every stage is shown."""
    asked: list[str] = []

    def stop(name: str, *_: Any) -> None:
        asked.append(name)
        raise Cut

    monkeypatch.setattr(cli, "_provenance", stop)
    for argv in COMMANDS:
        if argv[0] in cli.STAGES:
            with pytest.raises(Cut):
                cli.main(argv)
    assert {*cli.STAGES} == {*asked}
    assert {argv[0] for argv in COMMANDS} >= {"inspect", "doctor", "resume", "report", "pipeline"}
