"""A value head on the policy's backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_kernels as rk
from tests.support.rollouts import experience, gradient, world
from tests.support.small import lines, ragged, small_policy
from trainer.data.packing import pack
from trainer.models.loading import load_policy, load_scalar
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.method import StepTotals
from trainer.stages.rl.shared_value import SharedValue
from trainer.stages.rl.value import value_model_for


def test_a_shared_backbone_gets_the_sum_of_both_gradients(tmp_path: Path) -> None:
    """One forward; loss and metrics are told apart; micro-batches change nothing."""
    cfg = ppo.PPOConfig(data=tmp_path, reward="", value_model="shared", value_coef=0.3, entropy_coef=0.1)
    batch, policy = experience(ragged(6)), small_policy()
    method = ppo.PPO(cfg)
    value = value_model_for(cfg, policy, [])
    assert isinstance(value, SharedValue)
    assert not value.values(batch.packed).any()
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in value.parameters()) == 32
    totals, plain = StepTotals(int(batch.packed.mask.sum()), 6), ppo.PPO(replace(cfg, value_model=None))
    plain.policy_loss(policy, batch, totals, 0.0).loss.backward()
    assert batch.returns is not None
    apart = rk.value_loss(
        value.values(batch.packed), batch.returns, old_values=batch.values, clip=0.2, mask=batch.packed.mask,
        num_tokens=totals.tokens,
    )  # fmt: skip
    (0.3 * apart.loss).backward()
    square = float(apart.loss.detach())
    wanted = [gradient(policy), gradient(value)]
    for budget in (10_000, 60):
        parts, seen = batch.parts(range(6), budget), 0.0
        for part in parts:
            out = method.policy_loss(policy, part, totals, 0.0, value)
            out.loss.backward()
            coef, term = out.weighted["value/loss"]
            assert coef == 0.3
            seen += float(term.detach())
        assert seen == pytest.approx(square, rel=1e-5)
        for mine, want in zip((gradient(policy), gradient(value)), wanted, strict=True):
            assert want.norm() > 1e-3
            assert (mine - want).norm() <= 1e-5 * want.norm()


def test_ppo_learns_on_a_shared_backbone_and_leaves_a_value_model(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path) | {"steps": 25, "batch_size": 40, "max_new_tokens": 6, "lr": 3e-3}
    rl_stage.ppo(ppo.PPOConfig(**options, value_model="shared", kl_coef=0.01, truncation="bootstrap"))
    steps = lines(tmp_path / "out" / "metrics.jsonl")
    scores = [step["objective/scores"] for step in steps]
    assert sum(scores[-4:]) / 4 > 0.7 > 0.2 > scores[0]
    assert all(step["loss/value_avg"] > 0 for step in steps)
    assert abs(steps[0]["loss/policy_avg"]) < 0.1
    packed = pack(ragged(3))
    policy, value = load_policy(str(tmp_path / "out")), load_scalar(str(tmp_path / "out" / "value"))
    with torch.no_grad():
        torch.testing.assert_close(value.values(packed), value.head(policy.hidden(packed)).squeeze(-1))
        assert value.values(packed).any()
