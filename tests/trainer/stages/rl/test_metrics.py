"""Metrics count what was sampled and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.rollouts import experience
from tests.support.small import ragged, small_policy
from trainer.data.packing import Sample
from trainer.stages.rl import grpo
from trainer.stages.rl.experience import Experience
from trainer.stages.rl.method import StepTotals
from trainer.stages.rl.metrics import named


def test_pitfall_11_metrics_count_what_was_sampled_and_nothing_else(tmp_path: Path) -> None:
    """Longer prompts in the same batch, and sequences without a target, change no metric; entropy is not negative."""
    policy = small_policy()
    samples = ragged(6)
    padded = [Sample([7] * 30, 30), *samples, Sample([3, 9, 9], 3)]
    few, many = experience(samples), experience(padded)
    rows = many.packed.select(range(1, 7))[1]
    columns = {}
    for name in ("old_logp", "ref_logp", "advantages"):
        column = torch.full((len(many.packed.input_ids),), 9.0)
        column[rows] = getattr(few, name)
        columns[name] = column
    more = Experience(many.packed, columns["old_logp"], columns["ref_logp"], many.entropy, many.scores,
                      many.truncated, advantages=columns["advantages"])  # fmt: skip
    method = grpo.GRPO(grpo.GRPOConfig(data=tmp_path, reward=""))
    totals = StepTotals(int(few.packed.mask.sum()), 6)
    found = [method.policy_loss(policy, x, totals, 0.1).metrics for x in (few, more)]
    assert found[0]["approx_kl"] > 0
    assert 0 < found[0]["clipfrac"] < 1
    assert found[0]["entropy"] >= 0
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x)


def test_steps_of_an_earlier_version_count_in_the_average() -> None:
    """A checkpoint within a rollout has them; there the loss was the policy's own."""
    both = {"lr": 0.1, "skipped": 0.0}
    found = named([{"loss": 3.0, **both}, {"loss": 9.0, "policy": 5.0, **both}])
    assert found["loss/policy_avg"] == 4.0
