"""A recipe of several stages over the small world of ``runs``, and a power cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

SHORT = {"batch_size": 4, "max_tokens": 40, "warmup_steps": 2, "save_every": 1, "quiet": True}
ALLOWED = ("--allow-code", "tests.support.runs")  # whose functions stand in the recipe
RL = {"data": "${world}/prompts.jsonl", "reward": "tests.support.runs:early_letters", "max_new_tokens": 4, "steps": 1}
STAGES: dict[str, dict[str, Any]] = {
    "facts": {"stage": "inspect", "data": "${world}/ranked.jsonl", "quiet": True},
    "split": {"data": "${world}/sft.jsonl", "held_out": 0.4, "quiet": True},
    "sft": {"model": "${world}/base", "data": "${split}/train.jsonl", "steps": 2, **SHORT},
    "reward": {"model": "${sft}", "data": "${world}/ranked.jsonl", "steps": 2, "calibration_new_tokens": 4, **SHORT},
    "ppo": {"model": "${sft}", **RL, **SHORT, "reward": ["helpful=${reward}", "brief=" + str(RL["reward"])]},
    "group": {"stage": "grpo", "model": "${sft}", **RL, **SHORT, "num_generations": 2},
    "after": {
        "stage": "eval", "model": "${group}", "base": "${sft}", "data": "${split}/held_out.jsonl", "judge": "${reward}",
        "max_new_tokens": 4, "quiet": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line writes to the environment; with these the test's own comes back afterwards."""
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


class Cut(BaseException):
    """The power fails: no handler of ours may save anything on the way out."""


def written(path: Path, stages: dict[str, Any], **more: Any) -> Path:
    """The recipe as a file; its variable ``world`` is the folder of that name beside it."""
    text = yaml.safe_dump({"vars": {"world": str(path / "world")}, "stages": stages, **more}, sort_keys=False)
    (path / "recipe.yaml").write_text(text)
    return path / "recipe.yaml"
