"""Importance weights, where sampler and trainer differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import experience, gradient, world
from tests.support.small import lines, ragged, small_policy
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.experience import importance
from trainer.stages.rl.method import StepTotals


def test_importance_weights_are_capped_and_their_effective_size_is_told() -> None:
    logp, mask = torch.tensor([-1.0, -1.0, -1.0, 7.0]), torch.tensor([True, True, True, False])
    sampler = torch.tensor([-1.0, -3.0, -0.5, -9.0])
    ratios = torch.tensor([1.0, 2.718281828**2, 2.718281828**-0.5], dtype=torch.float64)
    weight, metrics = importance(logp, sampler, mask, 2.0)
    capped = ratios.clamp(max=2.0)
    assert weight is not None
    torch.testing.assert_close(weight[:3].double(), capped, rtol=1e-6, atol=1e-6)
    assert metrics == pytest.approx(
        {
            "sampling/importance_ratio_min": float(ratios.min()),
            "sampling/importance_ratio_max": float(ratios.max()),
            "sampling/ess": float(capped.sum() ** 2 / (3 * capped.square().sum())),
            "sampling/capped": 1 / 3,
        }
    )
    weight, metrics = importance(logp, sampler, mask, None)
    assert weight is None
    assert metrics["sampling/ess"] == pytest.approx(float(ratios.sum() ** 2 / (3 * ratios.square().sum())))


def test_importance_weights_weigh_the_policy_loss_and_nothing_else(tmp_path: Path) -> None:
    """Twice the weight on some tokens is twice their share of the gradient; denominators stay."""
    batch, policy = experience(ragged(6)), small_policy()
    method = grpo.GRPO(grpo.GRPOConfig(data=tmp_path, reward=""))
    totals = StepTotals(int(batch.packed.mask.sum()), 6)
    some = torch.arange(len(batch.old_logp)) % 3 == 0
    flats = []
    for weight in (None, torch.where(some, 2.0, 1.0), some.float()):
        part = replace(batch, token_weight=weight).parts(range(6), 10_000)[0]
        method.policy_loss(policy, part, totals, 0.1).loss.backward()
        flats.append(gradient(policy))
    assert flats[2].norm() > 1e-4
    torch.testing.assert_close(flats[1] - flats[0], flats[2], rtol=1e-3, atol=1e-5)


def test_a_sampler_that_agrees_changes_nothing_to_speak_of(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path)
    seen = []
    for cap in (None, 2.0):
        options["out"] = tmp_path / str(cap)
        rl_stage.ppo(ppo.PPOConfig(**options, importance_cap=cap))
        seen.append(lines(options["out"] / "metrics.jsonl"))
    for without, capped in zip(*seen, strict=True):
        assert without["sampling/ess"] == pytest.approx(1, abs=1e-6)
        assert "sampling/capped" not in without
        assert capped["sampling/capped"] == 0
        assert capped["loss/policy_avg"] == pytest.approx(without["loss/policy_avg"], rel=1e-2, abs=1e-4)
