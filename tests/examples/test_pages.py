"""What is said of the pages of examples/: how long they are, what they import, how they are called."""

from __future__ import annotations

import ast
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.examples.pages import FOLDER, PAGES, ROOT, page

pytest.importorskip("transformers")

MOST_LINES = {"dpo_trl.py": 100, "grpo_hf.py": 140, "own_loss.py": 79, "ppo.py": 200}


def test_every_page_is_known():
    assert sorted(MOST_LINES) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_on_a_page(name: str):
    assert len((FOLDER / name).read_text().splitlines()) <= MOST_LINES[name]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_copied(name: str):
    """It imports neither the trainer nor anything of this repository but the package."""
    imported = set()
    for node in ast.walk(ast.parse((FOLDER / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(str(node.module).split(".")[0])
    assert "rlhf_kernels" in imported
    ours = {path.stem for path in [*ROOT.iterdir(), *FOLDER.iterdir()]} - {"rlhf_kernels"}
    assert not imported & ours


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_its_commands(name: str):
    doc = ast.get_docstring(ast.parse((FOLDER / name).read_text())) or ""
    commands = [line.split("#")[0].split() for line in doc.splitlines() if line.startswith("    python")]
    assert ["python", f"examples/{name}"] in commands
    assert any(command[2:3] == ["--model"] for command in commands)
    assert all(command[1] == f"examples/{name}" for command in commands)


def test_the_table_is_that_of_the_files():
    row = re.compile(r"^\| \[(\S+)\]\((\S+)\) \|[^|]+\| (\d+) \| `(.*)` \|$", re.M)
    table = row.findall((FOLDER / "README.md").read_text())
    assert sorted(name for name, *_ in table) == PAGES
    for name, link, lines, command in table:
        text = (FOLDER / name).read_text()
        assert link == name
        assert int(lines) == len(text.splitlines())
        assert command in re.sub(r" +", " ", text)


def test_examples_are_in_the_sdist_and_not_in_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    assert "recursive-include examples *.py *.md" in (ROOT / "MANIFEST.in").read_text().splitlines()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert not [name for name in packages if name.startswith("examples")]


class Recorded:
    """Stands for a class of TRL, and remembers how it was called."""

    made: list[Recorded]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs, self.trained = args, kwargs, False
        self.state = SimpleNamespace(log_history=[{"loss": 1.0}])
        type(self).made = [*getattr(type(self), "made", []), self]

    def train(self) -> None:
        self.trained = True


def kind(name: str) -> Any:
    return type(name, (Recorded,), {})


@pytest.mark.parametrize("options", [(), ("--plain",)], ids=["fused", "plain"])
def test_the_page_of_trl_calls_the_class_that_it_names(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """With stand-ins for TRL and datasets, which only `make test-peers` installs: that runs the page itself."""
    source = ast.parse((ROOT / "rlhf_kernels" / "integrations" / "trl.py").read_text())
    assert "FusedDPOTrainer" in {node.name for node in source.body if isinstance(node, ast.ClassDef)}
    theirs, ours, config = kind("DPOTrainer"), kind("FusedDPOTrainer"), kind("DPOConfig")
    dataset = SimpleNamespace(from_dict=lambda columns: columns)
    stand_ins = {
        "trl": {"DPOConfig": config, "DPOTrainer": theirs},
        "datasets": {"Dataset": dataset, "load_dataset": None},
        "rlhf_kernels.integrations.trl": {"FusedDPOTrainer": ours},
    }
    for name, names in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    assert page("dpo_trl").main(["--steps", "20", *options]) == [{"loss": 1.0}]

    called, idle = (theirs, ours) if options else (ours, theirs)
    (trainer,), (settings,) = called.made, config.made
    assert not hasattr(idle, "made")
    assert trainer.trained
    (model,), given = trainer.args, trainer.kwargs
    assert given["args"] is settings
    assert settings.kwargs["max_steps"] == 20
    assert type(given["ref_model"]) is type(model)
    assert given["ref_model"] is not model
    pairs = given["train_dataset"]
    assert sorted(pairs) == ["chosen", "prompt", "rejected"]
    for texts in zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True):
        assert len({text.split()[-1] for text in texts}) == 1  # One thing is asked for, and given.
        assert given["processing_class"].unk_token_id is None
        ids = given["processing_class"](" ".join(texts)).input_ids
        assert len(ids) == len(" ".join(texts).split())
        assert model.config.pad_token_id not in ids  # Every word is known.
