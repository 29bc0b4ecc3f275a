"""What the tests of this room share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.small import LETTERS, small_policy, write

QUIET: dict[str, Any] = {"quiet": True, "batch_size": 8, "warmup_steps": 2}


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """A model and pairs of ragged replies; the chosen one has more a."""
    small_policy(scale=1.0).save(tmp_path / "model")
    source, rows = random.Random(1), []
    for _ in range(24):
        chosen = ["a"] * 3 + source.sample(LETTERS[1:], source.randint(1, 9))
        rejected = source.sample(LETTERS[1:], source.randint(1, 9))
        rows.append({"prompt": " ".join(source.sample(LETTERS, source.randint(1, 5))), "chosen": " ".join(chosen),
                     "rejected": " ".join(rejected)})  # fmt: skip
    return QUIET | {
        "model": str(tmp_path), "data": write(tmp_path / "pairs.jsonl", rows), "out": tmp_path / "out",
    }  # fmt: skip
