"""The pages of examples/, for the tests that read and run them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
PAGES = sorted(path.name for path in FOLDER.glob("*.py"))


def page(name: str) -> ModuleType:
    """A page as a module of its own. Other packages bring folders named examples, so it is found by its path."""
    spec = importlib.util.spec_from_file_location(f"page_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
