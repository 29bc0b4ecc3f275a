"""What the tests of this room share."""

from __future__ import annotations

import pytest

from tests.support.small import small_policy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    small_policy(scale=1.0).save(path / "model")
    return str(path)
