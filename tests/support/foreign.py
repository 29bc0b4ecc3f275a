"""A folder in which a command is given, with a recipe, modules and data of others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

THEIRS = "import pathlib\npathlib.Path({ran!r}).touch()\ndef f(p, r, e): return [float(len(x)) for x in r]\n"
SHORT = {"steps": 1, "batch_size": 2, "num_generations": 2, "max_new_tokens": 2, "quiet": True}


class Place:
    """Modules tell that they ran by a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.ran, self.out = path, path / "ran", path / "out"
        text = THEIRS.format(ran=str(self.ran))
        (path / "theirs.py").write_text(text)
        (path / "pack" / "inner").mkdir(parents=True)
        for name in ("pack/__init__.py", "pack/inner/__init__.py", "pack/inner/deep.py"):
            (path / name).write_text(text)
        (path / "d.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n')

    def recipe(self, **options: Any) -> str:
        stage = {"data": str(self.path / "d.jsonl"), **SHORT, **options}
        (self.path / "r.yaml").write_text(yaml.safe_dump({"stages": {"grpo": stage}}))
        return str(self.path / "r.yaml")

    def config(self, **options: Any) -> str:
        (self.path / "c.yaml").write_text(yaml.safe_dump({"data": str(self.path / "d.jsonl"), **SHORT, **options}))
        return str(self.path / "c.yaml")


@pytest.fixture(name="place")
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield Place(tmp_path)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("theirs", "pack"):
            del sys.modules[name]
