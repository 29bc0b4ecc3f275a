"""The demo in short: it runs end to end, its world is as told, its report is there."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer_worlds import lines
from trainer import demo_task as task
from trainer.demo import Clock, Demo, DemoConfig
from trainer.evaluate import mean, proportion, win_rate
from trainer.models import load_policy, load_scalar

ROOT = Path(__file__).parents[1]
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


def test_no_set_of_words_is_both_trained_on_and_held_out() -> None:
    source = random.Random(0)
    trained, held_out = (
        {frozenset(p.split()[3:]) for p in task.prompts(3000, source, held_out=held)} for held in (False, True)
    )
    assert not trained & held_out
    assert len(held_out) > 1000


def test_the_judge_knows_what_is_wanted() -> None:
    prompt = "please sort : salt lemon fig olive mango"
    best = task.judge(prompt, "sure : fig lemon mango olive salt")
    assert best.exact
    assert best.clean
    worse = {
        "order": "sure : lemon fig mango olive salt",
        "hedged": "maybe : fig lemon mango olive salt",
        "rude": "ugh : fig lemon mango olive salt",
        "long": "sure : fig lemon mango olive salt . hope this helps",
        "foreign": "sure : fig lemon mango olive thyme",
        "repeated": "sure : fig lemon mango olive salt salt",
        "babble": "sure : fig lemon mango olive salt : :",
    }
    for name, response in worse.items():
        assert task.judge(prompt, response).score < best.score, name
    assert task.judge(prompt, "sure : fig lemon mango olive salt", ended=False).score < best.score
    for name in ("order", "foreign", "repeated"):
        assert not task.judge(prompt, worse[name]).exact, name


def test_annotators_follow_plackett_luce() -> None:
    """With scores s, the first place goes to i with probability softmax(s / noise)."""
    prompt, source = "please sort : salt lemon fig olive mango", random.Random(0)
    pair = [("sure : fig lemon mango olive salt", True), ("maybe : fig lemon mango olive salt", True)]
    gap = task.judge(prompt, pair[0][0]).score - task.judge(prompt, pair[1][0]).score
    first = sum(task.annotate(prompt, pair, source, noise=2.0)[0] == 0 for _ in range(4000)) / 4000
    assert first == pytest.approx(1 / (1 + 2.718281828 ** (-gap / 2.0)), abs=0.03)
    assert task.annotate(prompt, [*pair, pair[0]], source, noise=0.0) == [0, 2, 0]


def test_four_in_ten_demonstrations_are_out_of_order() -> None:
    source = random.Random(0)
    prompts = task.prompts(2000, source, held_out=False)
    verdicts = [task.judge(p, task.demonstrate(p, source)) for p in prompts]
    assert sum(v.exact for v in verdicts) / 2000 == pytest.approx(0.6, abs=0.04)
    assert sum(v.clean for v in verdicts) / 2000 == pytest.approx(0.6, abs=0.04)


def test_intervals_cover() -> None:
    source, inside = random.Random(0), 0
    for _ in range(400):
        inside += (e := proportion(sum(source.random() < 0.9 for _ in range(50)), 50)).low <= 0.9 <= e.high
    assert 0.91 <= inside / 400 <= 0.99
    inside = 0
    for seed in range(200):
        e = mean([source.gauss(1, 2) for _ in range(60)], resamples=400, seed=seed)
        inside += e.low <= 1 <= e.high
    assert 0.88 <= inside / 200 <= 0.99
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 0]).value == 0.625


def test_clock_books_what_passed() -> None:
    clock = Clock()
    sum(range(300_000))
    clock.lap("work")
    assert 0 < clock.cpu_seconds["work"] < 60
    assert clock.seconds.keys() == {"work"}
