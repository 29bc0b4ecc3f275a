"""What the tests of the trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import world


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models and data, that the tests of one module share."""
    return world(tmp_path_factory.mktemp("faults"))
