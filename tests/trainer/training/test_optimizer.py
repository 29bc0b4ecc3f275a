"""What Adam is given at each step, and a gradient that is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from tests.support.small import small_policy
from trainer.stages import sft
from trainer.training.defaults import decided
from trainer.training.optimizer import Optimizer


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_third_time(tmp_path: Path) -> None:
    policy = small_policy()
    before = [p.clone() for p in policy.parameters()]
    optimizer = Optimizer(decided(sft.SFTConfig(data=tmp_path)), policy, 10)

    def bad(_: int) -> rk.LossOutput:
        return rk.LossOutput(policy.weight.sum() * float("nan"), {})

    for i in range(2):
        assert optimizer.step([0], bad, [1])["skipped"] == i + 1
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        optimizer.step([0], bad, [1])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_adam_gets_the_schedule_and_decays_matrices_only(tmp_path: Path) -> None:
    policy = small_policy()
    cfg = decided(sft.SFTConfig(data=tmp_path, lr=0.5, warmup_steps=4, weight_decay=0.1))
    optimizer = Optimizer(cfg, policy, 10)
    for rate in (0.125, 0.25):
        found = optimizer.step([0], lambda _: rk.LossOutput(policy.weight.sum() * 0.0, {}), [1])
        assert found["lr"] == rate
        assert [group["lr"] for group in optimizer.adam.param_groups] == [rate, rate]
    for group in optimizer.adam.param_groups:
        assert group["params"]
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
