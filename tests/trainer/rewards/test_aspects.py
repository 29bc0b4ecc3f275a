"""Several rewards at once: weighed, kept in their range, and logged apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import world
from tests.support.small import lines, small_policy, small_scalar
from tests.trainer.rewards.test_compare import options
from tests.trainer.rewards.test_sources import RECORDS, ROLLOUT, score
from trainer.models.policy import ScalarModel
from trainer.rewards.aspects import Rewards
from trainer.rewards.names import only_models
from trainer.rewards.truncation import fixed_score
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.value import value_model_for

HERE = "tests.trainer.rewards.test_aspects"


def words(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    return [float(len(r.split())) for r in responses]


def test_several_aspects_are_weighed_and_logged_apart(tmp_path: Path) -> None:
    tokenizer, device = small_policy().tokenizer, torch.device("cpu")
    for seed in (0, 1):
        small_scalar(seed).save(tmp_path / str(seed))
    members = torch.stack([score(str(tmp_path / s)) for s in "01"])
    cfg = options(reward=(f"helpful={tmp_path / '0'},{tmp_path / '1'}@0.5", f"brief={HERE}:words@-2"))
    rewards = Rewards(cfg, tokenizer, device)
    scores, logged = rewards(ROLLOUT, RECORDS)
    torch.testing.assert_close(scores, 0.5 * members.mean(0) - 2 * torch.tensor([1.0, 2.0]))
    assert logged == pytest.approx(
        {
            "rewards/helpful": float(members.mean()),
            "rewards/helpful_std": float(members.mean(0).std(unbiased=False)),
            "rewards/helpful_spread": float(members.std(0, unbiased=False).mean()),
            "rewards/brief": 1.5,
            "rewards/brief_std": 0.5,
        },
        rel=1e-4,
    )
    single = Rewards(options(reward=f"{HERE}:words"), tokenizer, device)
    scores, logged = single(ROLLOUT, RECORDS)
    assert (scores.tolist(), logged) == ([1.0, 2.0], {})


def test_ppo_logs_what_trades_off(tmp_path: Path) -> None:
    """And starts its value model from the first reward model among the sources."""
    small_scalar(3).save(tmp_path / "rm")
    run: dict[str, Any] = world(tmp_path) | {"reward": (f"{HERE}:words@0.1", f"kind={tmp_path / 'rm'}"), "steps": 1}
    rl_stage.ppo(ppo.PPOConfig(**run, reward_normalize=True, reward_clip=1.5, lr=1e-9, value_lr=1e-9))
    (step,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert step["rewards/reward_1"] > 1
    assert step["rewards/kind_std"] > 0
    assert abs(step["objective/scores"]) < 0.1 + 1.5
    value = value_model_for(ppo.PPOConfig(**run), small_policy(), [])
    assert not value.head.weight.any(), "its head starts at zero"
    assert isinstance(value, ScalarModel)
    for mine, wanted in zip(value.backbone.parameters(), small_scalar(3).backbone.parameters(), strict=True):
        assert torch.equal(mine, wanted)


def test_what_a_cut_response_scores_is_known_of_reward_models_alone(tmp_path: Path) -> None:
    small_scalar().save(tmp_path / "model")
    function = f"{HERE}:words"
    for reward, given, wanted in (
        (str(tmp_path), None, -2.0), (f"a={tmp_path},{tmp_path}@0.5", None, -2.0), (str(tmp_path), -1.0, -1.0),
        (function, None, None), (("a=" + str(tmp_path), "b=" + function), None, None), (function, 0.5, 0.5),
    ):  # fmt: skip
        cfg = options(reward=reward, truncation_score=given)
        assert fixed_score(cfg, only_models=only_models(cfg.reward)) == wanted
