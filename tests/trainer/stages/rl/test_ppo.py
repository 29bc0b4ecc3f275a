"""PPO: the KL as a term of the loss, and that it learns."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.rollouts import experience, gradient, returns_of
from tests.support.small import lines, ragged, small_policy
from tests.trainer.stages.test_stages import demonstrations
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.method import StepTotals


def test_the_kl_in_the_loss_pulls_to_the_reference_and_leaves_rewards_alone(tmp_path: Path) -> None:
    cfg = ppo.PPOConfig(data=tmp_path, reward="", kl_in="loss", kl="k2", lam=1.0)
    method, policy, batch = ppo.PPO(cfg), small_policy(), experience(ragged(6))
    found, metrics = method.advantages(batch, 5.0)
    assert found is not None
    assert metrics["objective/kl_coef"] == 5.0
    for i in range(6):
        if len(returns := returns_of(found, i)):
            torch.testing.assert_close(returns, batch.scores[i].expand(len(returns)))
    totals = StepTotals(int(batch.packed.mask.sum()), 6)
    flats = []
    for beta in (0.0, 2.0):
        method.policy_loss(policy, found, totals, beta).loss.backward()
        flats.append(gradient(policy))
    packed, mask = batch.packed, batch.packed.mask
    logp = policy.stats(packed).logp
    (2.0 * 0.5 * (logp - batch.ref_logp).square()[mask].sum() / totals.tokens).backward()
    wanted = gradient(policy)
    assert (flats[1] - flats[0] - wanted).norm() <= 1e-4 * wanted.norm()


HERE = "tests.support.small"


def test_ppo_learns_a_function_of_the_response(base: str, tmp_path: Path) -> None:
    cfg = ppo.PPOConfig(
        model=base, data=demonstrations(tmp_path / "d.jsonl"), reward=f"{HERE}:share_of_a",
        out=tmp_path / "out", steps=30, batch_size=40, max_new_tokens=6, lr=3e-3, value_lr=3e-3, kl_coef=0.01,
        truncation="bootstrap", quiet=True,
    )  # fmt: skip
    rl_stage.ppo(cfg)
    scores = [step["objective/scores"] for step in lines(tmp_path / "out" / "metrics.jsonl")]
    assert sum(scores[-5:]) / 5 > 0.7 > 0.3 > scores[0]
