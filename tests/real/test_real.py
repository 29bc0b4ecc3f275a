"""A pretrained model under the defaults: nothing is ruined, and reinforcement learning helps. `make test-real`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.real import commands, mood, topics
from trainer.base import statistics
from trainer.cli import program as cli

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

NOISE = 0.02  # nats or units of a loss over the same rows, whose steps are still in their warm-up
BY_THE_LIMIT = {"length", "truncation"}  # alarms about replies that the test itself cuts short
LOSSES = ("sft", "reward", "dpo", "ipo", "kto", "orpo", "simpo")


@pytest.fixture(scope="module")
def model() -> str:
    found = os.environ.get("REAL_MODEL", "")
    if not (Path(found) / "config.json").is_file():
        pytest.fail(f"REAL_MODEL: got {found!r}, want the folder of a pretrained model; make test-real makes one")
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    commands.data(path := tmp_path_factory.mktemp("real"))
    return path


@pytest.mark.parametrize("stage", commands.LINES)
def test_every_stage_is_gentle(stage: str, model: str, here: Path, record_property) -> None:
    """Three steps of each: losses fall or stay, replies stay within a nat of the model, and nothing raises an alarm."""
    began = time.process_time()
    commands.run(stage, model, here)
    told = f"{stage}: {time.process_time() - began:.0f} CPU s"
    assert not commands.alarms(here / stage) - BY_THE_LIMIT
    if stage in LOSSES:
        first, *_, last = (row["loss"] for row in commands.metrics(here / stage))
        told += f", loss {first:.4f} to {last:.4f}"
        assert last <= first + NOISE
    if stage in ("ppo", "grpo"):
        nats = [row.get("objective/kl", 0.0) for row in commands.metrics(here / stage)]
        told += f", at most {max(nats):.3f} nats per reply"
        assert max(nats) <= 1
    record_property("table", told)


def test_reinforcement_learning_helps(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property
) -> None:
    """Twenty small rollouts under the defaults sound gladder on topics that they have not seen."""
    heard: list[list[float]] = []

    def positive(prompts: Sequence[str], responses: Sequence[str], records: Sequence[object]) -> list[float]:
        heard.append([mood.mood(text) for text in responses])
        return heard[-1]

    monkeypatch.setattr(mood, "positive", positive)
    train, held_out = (topics.write(tmp_path / f"{len(t)}.jsonl", t) for t in (topics.TRAIN, topics.HELD_OUT))
    common = ["--reward", "tests.real.mood:positive", "--max-new-tokens", "16"]
    small = ["--batch-size", "2", "--steps", "20"]
    began = time.process_time()
    assert cli.main(["grpo", "--model", model, "--data", str(train), *common, *small, "--out", f"{tmp_path}/grpo"]) == 0
    seconds = time.process_time() - began
    heard.clear()
    judge = ["--judge", "tests.real.mood:positive", "--max-new-tokens", "16"]
    files = ["--model", f"{tmp_path}/grpo", "--base", model, "--data", str(held_out), "--out", f"{tmp_path}/eval"]
    assert cli.main(["eval", *files, *judge]) == 0
    base, policy = heard
    gain = statistics.mean([after - before for before, after in zip(base, policy, strict=True)])
    nats = [row.get("objective/kl", 0.0) for row in commands.metrics(tmp_path / "grpo")]
    record_property("table", (
        f"{len(base)} held-out topics: {sum(base) / len(base):.3f} before, {sum(policy) / len(policy):.3f} after, "
        f"gain {gain} (95 %, paired); {nats[-1]:.2f} nats per reply; {seconds:.0f} CPU s of training"
    ))  # fmt: skip
    assert len(base) >= 16
    assert gain.low > 0
    assert "update" not in commands.alarms(tmp_path / "grpo")
