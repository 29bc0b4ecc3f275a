"""The stages: denominators, and that each of them learns."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rlhf_kernels as rk
from tests.fault_worlds import config, train, world
from tests.trainer_worlds import LETTERS, lines, ragged, small_policy, small_scalar, write
from trainer import ppo, reward, sft
from trainer.models import load_policy, load_scalar
from trainer.stage import Optimizer

HERE = "tests.trainer_worlds"


def demonstrations(path: Path) -> Path:
    source = random.Random(0)
    words = [source.sample(LETTERS, 4) for _ in range(10)]
    return write(path, ({"prompt": " ".join(w[:2]), "response": " ".join(w[2:])} for w in words))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    small_policy(scale=1.0).save(path / "model")
    return str(path)


def gradient(model: nn.Module) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("max_tokens", [400, 120, 60, 1])
def test_micro_batches_do_not_change_gradients(max_tokens: int, tmp_path: Path) -> None:
    """Pitfall 5: every denominator is that of the whole step. Sequences of 3 and of 40 tokens among them."""
    policy, scalar, samples = small_policy(), small_scalar(), ragged(8)
    cfg = sft.SFTConfig(data=tmp_path)
    groups = [
        reward.Ranked(samples[:3], [0, 1, 2]),
        reward.Ranked(samples[3:5], [1, 0]),
        reward.Ranked(samples[5:], [0, 1, 1]),
    ]
    rewarding = reward.RewardConfig(data=tmp_path, center_coef=0.1)

    def gradients(budget: int) -> list[torch.Tensor]:
        batches = sft.micro_batches(samples, budget, "cpu")
        tokens = sum(int(b.mask.sum()) for b in batches)
        for batch in batches:
            sft.loss(cfg, policy, batch, tokens).loss.backward()
        found = [gradient(policy)]
        ranked = reward.micro_batches(groups, budget, torch.device("cpu"))
        for batch in ranked:
            reward.loss(rewarding, scalar, batch, sum(b.count for b in ranked)).loss.backward()
        return [*found, gradient(scalar)]

    for mine, wanted in zip(gradients(max_tokens), gradients(10_000), strict=True):
        assert wanted.norm() > 1e-3
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_stages_report_the_same_first_step_for_any_budget(stage: str, base: str, tmp_path: Path) -> None:
    """Pitfall 5 through the stages themselves: loss and gradient norm of step one."""
    seen = []
    for budget in (10_000, 12):
        out = tmp_path / str(budget)
        common: dict[str, Any] = {
            "model": base,
            "out": out,
            "steps": 1,
            "batch_size": 10,
            "quiet": True,
            "max_tokens": budget,
        }
        if stage == "sft":
            sft.train(sft.SFTConfig(data=demonstrations(tmp_path / "d.jsonl"), **common))
        elif stage == "reward":
            reward.train(reward.RewardConfig(data=rankings(tmp_path / "r.jsonl"), calibration=0, **common))
        else:
            cfg = ppo.PPOConfig(
                data=demonstrations(tmp_path / "d.jsonl"),
                reward=f"{HERE}:share_of_a",
                epochs=1,
                minibatches=1,
                **common,
            )
            ppo.train(dataclasses.replace(cfg, max_new_tokens=8))
        seen.append(lines(out / "metrics.jsonl")[0])
    for name in seen[0].keys() - {"stage", "eps", "rollout/sampler_delta"}:
        if name.startswith("timing/"):
            continue
        assert seen[0][name] == pytest.approx(seen[1][name], rel=2e-4, abs=2e-6), name


def rankings(path: Path) -> Path:
    """More a is better."""
    source = random.Random(1)
    records = []
    for _ in range(10):
        counts = source.sample(range(5), 4)
        responses = [" ".join(["a"] * c + source.sample(LETTERS[1:], 5 - c)) for c in counts]
        records.append(
            {"prompt": " ".join(source.sample(LETTERS, 2)), "responses": responses, "ranks": [5 - c for c in counts]}
        )
    return write(path, records)


def test_sft_learns_ten_examples_by_heart(base: str, tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "d.jsonl")
    cfg = sft.SFTConfig(
        model=base, data=data, out=tmp_path / "out", steps=120, batch_size=10, lr=1e-2, eval_data=data, quiet=True
    )
    policy = sft.train(cfg)
    assert sft.held_out_loss(policy, sft.samples_of(cfg, policy, lines(data)), 1000) < 0.05
    again = load_policy(str(tmp_path / "out"))
    packed = sft.micro_batches(sft.samples_of(cfg, policy, lines(data)), 1000, "cpu")[0]
    with torch.no_grad():
        assert torch.equal(again.stats(packed).logp, policy.stats(packed).logp)


def test_reward_model_learns_ten_rankings_and_keeps_its_statistics(base: str, tmp_path: Path) -> None:
    data = rankings(tmp_path / "r.jsonl")
    cfg = reward.RewardConfig(
        model=base, data=data, out=tmp_path / "out", steps=60, batch_size=10, lr=3e-3, eval_data=data, quiet=True
    )
    model, accuracy = reward.train(cfg)
    assert accuracy is not None
    assert accuracy.value == 1.0
    again = load_scalar(str(tmp_path / "out"))
    groups = reward.groups_of(cfg, model.tokenizer, lines(data))
    packed = reward.micro_batches(groups, 10_000, torch.device("cpu"))[0].packed
    with torch.no_grad():
        assert torch.equal(again.scores(packed), model.scores(packed))
        assert not torch.allclose(model.scores(packed), model.raw_scores(packed))


def test_ppo_learns_a_function_of_the_response(base: str, tmp_path: Path) -> None:
    cfg = ppo.PPOConfig(
        model=base, data=demonstrations(tmp_path / "d.jsonl"), reward=f"{HERE}:share_of_a",
        out=tmp_path / "out", steps=30, batch_size=40, max_new_tokens=6, lr=3e-3, value_lr=3e-3, kl_coef=0.01,
        truncation="bootstrap", quiet=True,
    )  # fmt: skip
    ppo.train(cfg)
    scores = [step["objective/scores"] for step in lines(tmp_path / "out" / "metrics.jsonl")]
    assert sum(scores[-5:]) / 5 > 0.7 > 0.3 > scores[0]


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_third_time(tmp_path: Path) -> None:
    policy = small_policy()
    before = [p.clone() for p in policy.parameters()]
    optimizer = Optimizer(sft.SFTConfig(data=tmp_path), policy, 10)

    def bad(_: int) -> rk.LossOutput:
        return rk.LossOutput(policy.weight.sum() * float("nan"), {})

    for i in range(2):
        assert optimizer.step([0], bad, [1])["skipped"] == i + 1
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        optimizer.step([0], bad, [1])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


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
