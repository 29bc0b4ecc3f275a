"""Judges and reward models that cannot read a prompt say so before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import policy, tokenizer
from tests.support.small import write
from trainer.data.chat import render_of
from trainer.models.policy import scalar_from
from trainer.rewards.fields import read_prompts
from trainer.stages.rl import grpo
from trainer.stages.rl import stage as rl_stage

USER = {"role": "user", "content": "What is 2 + 2?"}


def judge(folder: Path, name: str, **config: Any) -> str:
    made = scalar_from(policy(name), torch.Generator().manual_seed(0))
    made.set_statistics(torch.tensor([-1.0, 1.0]))
    for key, value in config.items():
        setattr(made.model.config, key, value)
    made.save(folder)
    return str(folder)


@pytest.mark.parametrize("option", ["reward", "gold_reward", "judge"])
def test_a_judge_that_cannot_read_a_prompt_says_so_before_any_work(tmp_path: Path, option: str):
    path = write(
        tmp_path / "d.jsonl", [{"prompt": "Hi"}, {"prompt": [{"role": "system", "content": "Be brief."}, USER]}]
    )
    name = judge(tmp_path / "judge", "gemma2")
    with pytest.raises(ValueError, match=rf"^{option}: .* cannot read .*d\.jsonl line 2: the chat template refuses"):
        read_prompts(path, [(option, name)], render=render_of(tokenizer("qwen2")))


def test_grpo_knows_its_file_and_line_where_a_reward_model_refuses(tmp_path: Path):
    policy("smollm2").save(tmp_path / "m")
    path = write(tmp_path / "d.jsonl", [{"prompt": "Hi"}] * 3 + [{"prompt": "What does <bos> mean?"}])
    cfg = grpo.GRPOConfig(
        model=str(tmp_path / "m"), data=path, out=tmp_path / "o", reward=judge(tmp_path / "j", "gemma2"),
        max_new_tokens=4, quiet=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"d\.jsonl line 4: a message holds the special token '<bos>'"):
        rl_stage.grpo(cfg)
