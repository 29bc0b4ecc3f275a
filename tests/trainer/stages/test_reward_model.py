"""A reward model learns rankings."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.small import lines
from tests.trainer.stages.test_stages import rankings
from trainer.models.loading import load_scalar
from trainer.stages import reward_model


def test_reward_model_learns_ten_rankings_and_keeps_its_statistics(base: str, tmp_path: Path) -> None:
    data = rankings(tmp_path / "r.jsonl")
    cfg = reward_model.RewardConfig(
        model=base, data=data, out=tmp_path / "out", steps=60, batch_size=10, lr=3e-3, eval_data=data, quiet=True
    )
    model, accuracy = reward_model.reward_model(cfg)
    assert accuracy is not None
    assert accuracy.value == 1.0
    again = load_scalar(str(tmp_path / "out"))
    groups = reward_model.groups_of(cfg, model.tokenizer, lines(data))
    packed = reward_model.micro_batches(groups, 10_000, torch.device("cpu"))[0].packed
    with torch.no_grad():
        assert torch.equal(again.scores(packed), model.scores(packed))
        assert not torch.allclose(model.scores(packed), model.raw_scores(packed))
