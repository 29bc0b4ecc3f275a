"""Models that do not fit each other or their data are refused before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.small import small_policy, write
from tests.trainer.rewards.test_reward_models import saved_bytes
from trainer.models.loading import load_scalar
from trainer.models.policy import scalar_from
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.run.log import RunLog
from trainer.stages import sft
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.stage import begin


def learned_positions(folder: Path, positions: int) -> str:
    tok = byte_tokenizer(["what is 1 + 1"], 270)
    config = GPT2Config(vocab_size=len(tok), n_positions=positions, n_embd=32, n_layer=1, n_head=2, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def test_no_sequence_is_longer_than_the_positions_of_the_model(tmp_path: Path):
    model = learned_positions(tmp_path / "m", 64)
    row = {"prompt": "what is 1 + 1? " * 9, "response": "it is 2. " * 9, "answer": "2"}
    path = write(tmp_path / "d.jsonl", [row] * 8)
    told: list[str] = []
    options: dict[str, Any] = {"model": model, "data": path, "steps": 1, "batch_size": 2, "quiet": True}
    log = RunLog(tmp_path / "sft", quiet=True)
    log.note = told.append  # type: ignore[method-assign]
    sft.sft(sft.SFTConfig(out=tmp_path / "sft", **options), log)
    assert f"max_length: got 1024, and {model} has 64 positions: sequences are cut to 64" in told
    more: dict[str, Any] = options | {"reward": "exact_answer", "num_generations": 2}
    rl_stage.grpo(grpo.GRPOConfig(out=tmp_path / "grpo", max_new_tokens=32, **more))
    with pytest.raises(ValueError, match="max_new_tokens: got 64, want less than the 64 positions"):
        rl_stage.grpo(grpo.GRPOConfig(out=tmp_path / "long", max_new_tokens=64, **more))


def test_a_value_model_has_positions_too(tmp_path: Path):
    tok = byte_tokenizer(["What is it?"], 280)
    tiny_policy(tok, 0, hidden=32, layers=1).save(tmp_path / "m")
    made = scalar_from(tiny_policy(tok, 0, hidden=32, layers=1), torch.Generator().manual_seed(0))
    made.model.config.max_position_embeddings = 40
    made.save(tmp_path / "v")
    path = write(tmp_path / "d.jsonl", [{"prompt": "What is it? " * 9}] * 2)
    told: list[str] = []
    cfg = ppo.PPOConfig(
        model=str(tmp_path / "m"), value_model=str(tmp_path / "v"), data=path, out=tmp_path / "o", batch_size=2,
        reward="tests.support.small:share_of_a", max_new_tokens=4, quiet=True,
    )  # fmt: skip
    loop = begin(cfg, ppo.PPO(cfg), told.append).loop
    assert loop.cfg.max_length == 40
    assert max(map(len, loop.given.prompts)) == 36


def test_a_value_model_reads_the_ids_of_the_policy(tmp_path: Path) -> None:
    """A reward model with other tokens cannot start it; one that was asked for by name is refused."""
    small_policy().save(tmp_path / "model")
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    load_scalar(saved_bytes(tmp_path), torch.Generator().manual_seed(0)).save(tmp_path / "reward" / "model")
    cfg = ppo.PPOConfig(
        model=str(tmp_path), data=data, out=tmp_path / "out", reward=str(tmp_path / "reward"), steps=1, batch_size=2,
        max_new_tokens=4, quiet=True,
    )  # fmt: skip
    rl_stage.ppo(cfg)
    assert load_scalar(str(tmp_path / "out" / "value")).tokenizer.get_vocab() == small_policy().tokenizer.get_vocab()
    with pytest.raises(ValueError, match="value_model: want the tokenizer of the policy"):
        rl_stage.ppo(dataclasses.replace(cfg, value_model=str(tmp_path / "reward")))
