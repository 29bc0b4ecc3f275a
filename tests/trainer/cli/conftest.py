"""What the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pipelines import STAGES, written
from tests.support.runs import world


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model and a recipe."""
    path = tmp_path_factory.mktemp("recipes")
    world(path / "world")
    written(path, STAGES)
    return path
