"""Options of reinforcement learning that have no meaning are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.rollouts import world
from tests.support.small import lines, write
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage


def test_responses_longer_than_a_sequence_are_refused(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p"}])
    options: dict[str, Any] = {"data": path, "out": tmp_path / "o", "quiet": True, "reward": "exact_answer"}
    for longest in (1024, 2048):
        with pytest.raises(ValueError, match=f"max_new_tokens: got {longest}, want less than max_length=1024"):
            rl_stage.grpo(grpo.GRPOConfig(max_new_tokens=longest, **options))


def test_options_without_a_meaning_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": tmp_path / "nowhere.jsonl", "reward": "", "out": tmp_path}
    options: list[tuple[dict[str, Any], str]] = [
        ({"clip": (-0.1, 0.2)}, r"clip: got \(-0.1, 0.2\)"),
        ({"kl_coef": -1.0}, "kl_coef: got -1.0, want zero or more"),
        ({"temperature": 0.0}, "temperature: got 0.0, want a positive number"),
        ({"epochs": 0}, "epochs: got 0, want at least 1"),
        ({"ptx_coef": 1.0}, "ptx_data: want a file of demonstrations"),
        ({"importance_cap": 0.5}, "importance_cap: got 0.5, want at least 1"),
        ({"lam": 1.5}, "lam: got 1.5, want a number from 0 to 1"),
        ({"value_clip": 0.0}, "value_clip: got 0.0, want a positive number"),
        ({"kl_target_per_seq": -6.0}, "kl_target_per_seq: got -6.0, want a positive number"),
    ]
    for bad, message in options:
        with pytest.raises(ValueError, match=message):
            rl_stage.ppo(ppo.PPOConfig(**common, **bad))
    with pytest.raises(ValueError, match=r"dual_clip: got 1.0, want a ratio above one"):
        rl_stage.grpo(grpo.GRPOConfig(**common, dual_clip=1.0))


def test_pitfall_10_a_sampler_that_leaves_out_the_tail_is_refused_unless_allowed(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path) | {"steps": 1, "top_p": 0.9}
    for more in ({}, {"allow_top_p": True, "importance_cap": 2.0}):
        with pytest.raises(ValueError, match=r"top_p: got 0.9, want 1: .* biased. allow_top_p accepts"):
            rl_stage.ppo(ppo.PPOConfig(**options, **more))
    rl_stage.ppo(ppo.PPOConfig(**options, allow_top_p=True))
    (step,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert step["rollout/sampler_delta"] > 0.05  # the sampler spreads the tail's share over the rest
    assert step["sampling/importance_ratio_max"] < 1
