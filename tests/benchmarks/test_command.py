"""``python -m benchmarks``: every measurement is a verb, and its rooms import downwards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import command

BENCHMARKS = Path(command.__file__).parent
ROOMS = ("suite", "gpu", "studies", "report", "measure", "contenders", "work")  # as CONTRIBUTING.md has them


@pytest.mark.parametrize("verb", command.VERBS)
def test_every_verb_has_a_command_that_says_its_name(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([verb, "--help"])
    assert ended.value.code == 0
    assert re.match(rf"usage: python -m benchmarks[ .]{verb} ", capsys.readouterr().out)


def test_the_list_of_verbs_has_a_line_for_each(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{verb:<12} {line}\n" in shown for verb, (_, line) in command.VERBS.items())


def test_options_reach_the_verb_and_its_status_comes_back(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    result = BENCHMARKS / "results" / "cpu-zen4-small.json"
    assert command.main(["report", "--summary", str(result)]) == 0
    assert "`cpu-zen4-small.json` |" in capsys.readouterr().out
    assert command.main(["check", "--baseline", "nowhere.json"]) == 2


def test_every_study_is_a_verb():
    modules = {module for module, _ in command.VERBS.values()}
    assert {f"studies.{path.stem}" for path in (BENCHMARKS / "studies").glob("[!_]*.py")} <= modules


def test_rooms_import_downwards():
    assert {path.name for path in BENCHMARKS.iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    imported = re.compile(r"^\s*from benchmarks\.(\w+)[.\w]* import |\"benchmarks\.(\w+)\.", re.MULTILINE)
    upwards = [
        (str(path.relative_to(BENCHMARKS)), other)
        for i, room in enumerate(ROOMS)
        for path in (BENCHMARKS / room).rglob("*.py")
        for other in map("".join, imported.findall(path.read_text()))
        if other in ROOMS[:i]
    ]
    assert upwards == []
