"""The trainer as a house: every room stands in CONTRIBUTING, questions have paths, PPO can be read by itself."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

from benchmarks.studies.walk import closure, functions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_ppo_and_its_loop_can_be_read_without_the_rest() -> None:
    """The algorithm: what advantages are, what is minimised, the loop around it and all that these stand on."""
    for start in ("trainer.stages.rl.ppo", "trainer.stages.rl.loop", "trainer.stages.rl.grpo"):
        files = closure(start)
        assert len(files) > 15, "it imports something"
        assert len(files) <= 30, sorted(f.name for f in files)
        assert sum(map(functions, files)) <= 260


def test_every_room_has_its_line() -> None:
    rooms = {folder.name for folder in (ROOT / "trainer").iterdir() if (folder / "__init__.py").exists()}
    assert len(rooms) > 10
    assert {room for room in rooms if f"{room}/" not in PAGE} == set()


def test_questions_are_answered_by_paths_that_exist() -> None:
    paths = re.findall(r"`(trainer/[\w/]+\.py)`", PAGE)
    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_no_file_hides_a_folder_in_its_name() -> None:
    """Where two files of a room begin with the same word and an underscore, they want a folder of that name."""
    for room in {file.parent for file in (ROOT / "trainer").rglob("*.py")}:
        words = [file.stem.partition("_")[0] for file in room.glob("[a-z]*_*.py")]
        assert len(words) == len(set(words)), f"{room.relative_to(ROOT)}: {sorted(words)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Wherever an import stands: at the top, in a function, or for annotations only."""
    files = sorted((ROOT / "trainer").rglob("*.py"))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = {other for other in found & names.keys() if names[other].name != "__init__.py"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    assert sum(map(len, graph.values())) > 300
