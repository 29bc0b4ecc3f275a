"""What the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small import LETTERS, small_policy, write
from trainer.evaluation.stage import EvalConfig

WORLDS = "tests.support.small"


@pytest.fixture
def world(tmp_path: Path) -> EvalConfig:
    """Two policies and ten prompts; they are judged by how much they say the letter a."""
    for seed, name in enumerate(("before", "after")):
        small_policy(seed).save(tmp_path / name / "model")
    prompts = write(tmp_path / "prompts.jsonl", ({"prompt": f"{LETTERS[i]} {LETTERS[i + 5]}"} for i in range(10)))
    return EvalConfig(
        model=str(tmp_path / "after"), base=str(tmp_path / "before"), data=prompts, judge=f"{WORLDS}:share_of_a",
        out=tmp_path / "out", max_new_tokens=6, quiet=True,
    )  # fmt: skip
