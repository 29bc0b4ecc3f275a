"""Short runs and ready-made experience for the tests of reinforcement learning."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.small import LETTERS, small_policy, write
from trainer.data.packing import Sample, pack
from trainer.models.policy import Policy
from trainer.stages.rl.experience import Experience

HERE = "tests.support.small"


def world(path: Path, policy: Policy | None = None) -> dict[str, Any]:
    """Options of a short run with ten prompts."""
    (policy or small_policy(scale=1.0)).save(path / "model")
    source = random.Random(0)
    data = write(path / "prompts.jsonl", ({"prompt": " ".join(source.sample(LETTERS, 2))} for _ in range(10)))
    return {
        "model": str(path), "data": data, "out": path / "out", "reward": f"{HERE}:share_of_a", "steps": 2,
        "batch_size": 10, "max_new_tokens": 8, "truncation_score": -2.0, "quiet": True,
    }  # fmt: skip


def experience(samples: list[Sample]) -> Experience:
    """With numbers as if somebody else had sampled and estimated."""
    packed, source = pack(samples), torch.Generator().manual_seed(1)
    n, mask = len(packed.input_ids), packed.mask
    old_logp, values, advantages, returns = (torch.randn(n, generator=source).where(mask, 0.0) for _ in range(4))
    old_logp, zeros, scores = old_logp - 3, torch.zeros(n), torch.linspace(0, 1, len(samples))
    return Experience(
        packed, old_logp, old_logp - 0.1, zeros, scores, torch.zeros(len(samples)).bool(), values,
        advantages=advantages, returns=returns,
    )  # fmt: skip


def gradient(model: nn.Module) -> torch.Tensor:
    """All gradients in a row, which are gone from the model afterwards."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def returns_of(found: Experience, i: int) -> torch.Tensor:
    """Returns at the response tokens of sequence i."""
    part = found.select([i])
    assert part.returns is not None
    assert not part.returns[~part.packed.mask].any()
    return part.returns[part.packed.mask]
