"""The stages: denominators, and that each of them learns."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.small import LETTERS, lines, ragged, small_policy, small_scalar, write
from trainer.stages import reward_model, sft
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage

HERE = "tests.support.small"


def demonstrations(path: Path) -> Path:
    source = random.Random(0)
    words = [source.sample(LETTERS, 4) for _ in range(10)]
    return write(path, ({"prompt": " ".join(w[:2]), "response": " ".join(w[2:])} for w in words))


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
        reward_model.Ranked(samples[:3], [0, 1, 2]),
        reward_model.Ranked(samples[3:5], [1, 0]),
        reward_model.Ranked(samples[5:], [0, 1, 1]),
    ]
    rewarding = reward_model.RewardConfig(data=tmp_path, center_coef=0.1)

    def gradients(budget: int) -> list[torch.Tensor]:
        batches = sft.micro_batches(samples, budget, "cpu")
        tokens = sum(int(b.mask.sum()) for b in batches)
        for batch in batches:
            sft.loss(cfg, policy, batch, tokens).loss.backward()
        found = [gradient(policy)]
        ranked = reward_model.micro_batches(groups, budget, torch.device("cpu"))
        for batch in ranked:
            reward_model.loss(rewarding, scalar, batch, sum(b.count for b in ranked)).loss.backward()
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
            sft.sft(sft.SFTConfig(data=demonstrations(tmp_path / "d.jsonl"), **common))
        elif stage == "reward":
            reward_model.reward_model(
                reward_model.RewardConfig(data=rankings(tmp_path / "r.jsonl"), calibration=0, **common)
            )
        else:
            cfg = ppo.PPOConfig(
                data=demonstrations(tmp_path / "d.jsonl"),
                reward=f"{HERE}:share_of_a",
                epochs=1,
                minibatches=1,
                **common,
            )
            rl_stage.ppo(dataclasses.replace(cfg, max_new_tokens=8))
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
