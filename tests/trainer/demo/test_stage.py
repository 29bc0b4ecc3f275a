"""The demo in short: it runs end to end, its world is as told, its report is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.small import lines
from trainer.demo import stage as demo
from trainer.demo.stage import Clock, Demo, DemoConfig
from trainer.models.loading import load_policy, load_scalar

ROOT = Path(__file__).parents[3]
SHORT = {
    "sft_steps": 40, "ranked_prompts": 120, "reward_steps": 10, "weak_reward_steps": 4, "ppo_steps": 2, "hack_steps": 2,
    "test_prompts": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    flags = [x for name, value in SHORT.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer", "demo", "--out", str(out), *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "Supervised fine-tuning",
        "Reward model",
        "PPO, on held-out prompts",
        "before",
        "after",
        "Acceptance",
    ):
        assert words in done.stdout
    return out


def test_the_run_folder_tells_everything(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["models"].keys() == {"sft", "ppo", "hack"}
    for name in ("judge", "exact", "win_rate"):
        found = summary["models"]["ppo"][name]
        assert found["low"] <= found["value"] <= found["high"]
    assert all(isinstance(kept, bool) for kept in summary["acceptance"].values())
    assert summary["time"]["cpu_seconds"]["total"] > 0
    stages = [line["stage"] for line in lines(run / "metrics.jsonl")]
    assert [stages.count(s) for s in ("sft", "reward", "ppo", "weak_reward", "hack")] == [40, 10, 2, 4, 2]
    assert "eval/win_rate" in next(line for line in lines(run / "metrics.jsonl") if line["stage"] == "ppo")
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not [f for f in run.rglob("*") if f.suffix in {".pt", ".bin", ".pkl"}]


def test_models_of_the_run_can_be_used(run: Path) -> None:
    assert load_policy(str(run / "ppo")).tokenizer.eos_token_id == 1
    assert load_scalar(str(run / "reward")).model.config.reward_std > 0
    losses = [line["loss"] for line in lines(run / "metrics.jsonl") if line["stage"] == "sft"]
    assert losses[-1] < 0.7 * losses[0]


def test_one_seed_gives_the_same_bits(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "two"):
        demo = Demo(DemoConfig(out=tmp_path / name, sft_steps=3, test_prompts=16, quiet=True, seed=3))
        policy = demo.sft()
        demo.file("ranked.jsonl", demo.ranked(policy, demo.test[:4], 0.5))
        files = ("sft/model/model.safetensors", "data/demonstrations.jsonl", "data/ranked.jsonl")
        seen.append([(tmp_path / name / file).read_bytes() for file in files])
    assert seen[0] == seen[1]


def test_clock_books_what_passed() -> None:
    clock = Clock()
    sum(range(300_000))
    clock.lap("work")
    assert 0 < clock.cpu_seconds["work"] < 60
    assert clock.seconds.keys() == {"work"}


@pytest.mark.slow
def test_pitfall_02_in_a_run(tmp_path: Path) -> None:
    """The demo from its first step, which also has to learn (1) what it promises."""
    summary = demo.demo(demo.DemoConfig(out=tmp_path, quiet=True))
    assert summary["acceptance"] == dict.fromkeys(summary["acceptance"], True)
    assert {"ppo_no_alarm", "hack_alarm"} <= summary["acceptance"].keys()
