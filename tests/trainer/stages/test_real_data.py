"""Stages on real data, by the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.small import lines
from trainer.models.loading import load_policy, load_scalar

HERE = "tests.support.small"

ROOT = Path(__file__).parents[3]


DATA = ROOT.parent / "shared" / "data"


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real data is not there")


def rlhf_train(*argv: object) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_data
def test_sft_and_reward_model_on_real_dialogues(tmp_path: Path) -> None:
    data = DATA / "hh_harmless_base.jsonl.gz"
    rlhf_train("sft", "--data", data, "--out", tmp_path / "sft", "--steps", 4, "--batch-size", 8, "--max-length", 256)
    losses = [step["loss"] for step in lines(tmp_path / "sft" / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 8
    rlhf_train(
        "reward", "--model", tmp_path / "sft", "--data", data, "--out", tmp_path / "reward", "--steps", 3,
        "--batch-size", 8, "--max-length", 256, "--calibration", 8, "--calibration-new-tokens", 16,
    )  # fmt: skip
    assert len(lines(tmp_path / "reward" / "metrics.jsonl")) == 3
    config = load_scalar(str(tmp_path / "reward")).model.config
    assert config.reward_std > 0
    assert (tmp_path / "reward" / "report.html").exists()


@needs_data
def test_ppo_on_real_problems_with_a_function_reward(tmp_path: Path) -> None:
    for name, function in {"digits": f"{HERE}:share_of_digits", "exact": "exact_answer"}.items():
        rlhf_train(
            "ppo", "--data", DATA / "gsm8k_train.jsonl.gz", "--reward", function, "--out", tmp_path / name,
            "--steps", 2, "--batch-size", 16, "--max-new-tokens", 24, "--epochs", 1, "--truncation", "bootstrap",
        )  # fmt: skip
    steps = lines(tmp_path / "digits" / "metrics.jsonl")
    assert [s["objective/kl"] == 0 for s in steps] == [True, False]
    assert all(0 < s["objective/scores"] < 1 and s["rollout/sampler_delta"] < 1e-4 for s in steps)
    load_policy(str(tmp_path / "digits"))
    # A random model solves nothing. Equal scores are no reason to change: the policy stays where it was, and finite.
    assert [s["objective/kl"] for s in lines(tmp_path / "exact" / "metrics.jsonl")] == [0, 0]
