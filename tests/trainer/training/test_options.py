"""Options of every stage that trains reach the loss and the log, or are refused."""

from __future__ import annotations

import pytest

from tests.support.runs import config, train, world
from tests.support.small import lines


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_tolerance_reaches_the_loss_and_the_log(tmp_path, stage):
    world(tmp_path)
    train(config(stage, tmp_path, tmp_path / "exact"))
    train(config(stage, tmp_path, tmp_path / "near", tolerance=0.2))
    exact, near = (lines(tmp_path / run / "metrics.jsonl") for run in ("exact", "near"))
    assert all(row["tolerance/lost"] <= 0.2 for row in near)
    dense = [row["tolerance/dense"] for row in near]
    assert max(dense) > 0, "36 tokens are too few to leave any out"
    assert stage == "grpo" or dense == pytest.approx([1.0] * len(dense)), "where each micro-batch has a gradient"
    assert not any("tolerance" in key for row in exact for key in row)


def test_a_tolerance_out_of_range_is_refused(tmp_path):
    world(tmp_path)
    with pytest.raises(ValueError, match=r"tolerance: got 1\.5, want a number above 0 and below 1"):
        train(config("sft", tmp_path, tmp_path / "run", tolerance=1.5))
