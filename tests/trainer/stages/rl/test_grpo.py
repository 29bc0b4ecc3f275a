"""GRPO and its relatives on the one loop, PPO-ptx, and the KL as a term of the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import experience, world
from tests.support.small import lines, ragged, small_policy
from trainer.stages.rl import grpo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.method import StepTotals


def by_hand(scores: torch.Tensor, baseline: str, scale: str) -> torch.Tensor:
    """Groups of four, one number per response."""
    groups = scores.view(-1, 4).double()
    mean = groups.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        mean = (groups.sum(1, keepdim=True) - groups) / 3
    deviation = {
        "none": torch.tensor(1.0),
        "group_std": groups.std(1, keepdim=True, unbiased=False) + 1e-6,
        "batch_std": groups.std(unbiased=False) + 1e-6,
    }[scale]
    return ((groups - mean) / deviation).flatten()


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_group_advantages_are_those_of_the_papers(baseline: Any, scale: Any, kl_in: Any, tmp_path: Path) -> None:
    """One number on every token of a response; KL in the reward is taken off the score before it is compared."""
    samples = ragged(8)
    batch = experience(samples)
    noise = torch.randn(len(batch.old_logp), generator=torch.Generator().manual_seed(5))
    batch = replace(batch, ref_logp=batch.old_logp + noise.where(batch.packed.mask, 0.0))
    cfg = grpo.GRPOConfig(data=tmp_path, reward="", num_generations=4, baseline=baseline, scale=scale, kl_in=kl_in)
    found, metrics = grpo.GRPO(cfg).advantages(batch, 0.3)
    assert found is not None
    assert found.advantages is not None
    kl = torch.stack([-x.sum() for x in noise.where(batch.packed.mask, 0.0).split(batch.packed.lengths)])
    each = by_hand(batch.scores - 0.3 * kl if kl_in == "reward" else batch.scores, baseline, scale)
    for want, mine, mask in zip(
        each, found.advantages.split(batch.packed.lengths), batch.packed.mask.split(batch.packed.lengths), strict=True
    ):
        torch.testing.assert_close(mine.double(), torch.where(mask, want, 0.0), rtol=1e-4, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert metrics["frac_reward_zero_std"] == 0
    level = grpo.GRPO(cfg).advantages(replace(batch, scores=torch.tensor([1.0] * 4 + [0, 1, 1, 1])), 0.0)
    assert level[1]["frac_reward_zero_std"] == 0.5
    assert level[0] is not None
    assert not level[0].select(range(4)).advantages.any()  # type: ignore[union-attr]


def test_reinforce_plus_plus_whitens_what_is_left_to_be_earned(tmp_path: Path) -> None:
    """Return of token t: the score less beta times the KL from t on; then mean 0 and variance 1 over all tokens."""
    batch = experience(ragged(6))
    mask, beta = batch.packed.mask, 0.2
    cfg = grpo.GRPOConfig(
        data=tmp_path, reward="", num_generations=1, baseline="batch", scale="batch_std", kl_in="reward"
    )
    found, _ = grpo.GRPO(cfg).advantages(batch, beta)
    assert found is not None
    assert found.advantages is not None
    ahead = []
    for i, lengths in enumerate(m.sum() for m in mask.split(batch.packed.lengths)):
        left = torch.arange(int(lengths), 0, -1)  # every token costs 0.1 nats
        ahead.append(batch.scores[i] - beta * 0.1 * left)
    flat = torch.cat(ahead).double()
    white = (flat - flat.mean()) / flat.std(unbiased=False)
    torch.testing.assert_close(found.advantages[mask].double(), white, rtol=1e-4, atol=1e-4)
    for bad, message in (
        ({"scale": "group_std"}, "which knows no groups"),
        ({"baseline": "mean", "num_generations": 1}, "num_generations: got 1, want at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.GRPO(replace(cfg, **bad))  # type: ignore[arg-type]


def test_grpo_learns_a_function_of_the_response(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path) | {"steps": 20, "max_new_tokens": 6, "lr": 3e-3}
    rl_stage.grpo(grpo.GRPOConfig(**options, num_generations=4, kl_coef=0.01))
    scores = [step["objective/scores"] for step in lines(tmp_path / "out" / "metrics.jsonl")]
    assert sum(scores[-4:]) / 4 > 0.6 > 0.2 > scores[0]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_tokens_are_averaged_as_named(reduction: Any, tmp_path: Path) -> None:
    """On-policy the loss is minus the mean advantage, whatever mean that is."""
    batch, policy = experience(ragged(6)), small_policy()
    packed, mask = batch.packed, batch.packed.mask
    with torch.no_grad():
        batch = replace(batch, old_logp=policy.stats(packed).logp)
    assert batch.advantages is not None
    cfg = grpo.GRPOConfig(data=tmp_path, reward="", reduction=reduction, kl_coef=0.0, max_new_tokens=50)
    out = grpo.GRPO(cfg).policy_loss(policy, batch, StepTotals(int(mask.sum()), 6), 0.0)
    each = [a[m] for a, m in zip(batch.advantages.split(packed.lengths), mask.split(packed.lengths), strict=True)]
    wanted = {
        "token_mean": torch.cat(each).mean(),
        "sequence_mean": torch.stack([x.mean() for x in each]).mean(),
        "sequence_sum": torch.stack([x.sum() for x in each]).mean(),
        "constant": torch.cat(each).sum() / (6 * 50),
    }[reduction]
    assert float(out.loss.detach()) == pytest.approx(-float(wanted), rel=1e-4)


def test_masked_responses_count_in_the_baseline_and_not_in_the_loss(tmp_path: Path) -> None:
    batch = replace(experience(ragged(8)), truncated=torch.tensor([False] * 3 + [True] + [False] * 4))
    common: dict[str, Any] = {"data": tmp_path, "reward": "", "num_generations": 4}
    whole, _ = grpo.GRPO(grpo.GRPOConfig(**common)).advantages(batch, 0.0)
    kept, _ = grpo.GRPO(grpo.GRPOConfig(**common, truncation="mask")).advantages(batch, 0.0)
    assert whole is not None
    assert kept is not None
    assert len(kept.scores) == 7
    rest = whole.select([0, 1, 2, 4, 5, 6, 7])
    assert torch.equal(kept.advantages, rest.advantages)  # type: ignore[arg-type]
    assert torch.equal(kept.scores, rest.scores)
