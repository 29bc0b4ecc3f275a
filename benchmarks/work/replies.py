"""Replies with rewards and values, and the truth about their advantages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.work.judge import Judge

GAMMA, LAM = 0.999, 0.95
Pair = tuple[Tensor, Tensor]  # advantages and returns, [B, T]


class Replies(NamedTuple):
    rewards: Tensor  # [B, T] float32
    values: Tensor  # [B, T]
    mask: Tensor  # [B, T] float32, all ones: everybody's conventions agree there

    @staticmethod
    def draw(replies: int, tokens: int, device: str = "cpu") -> Replies:
        rng = torch.Generator().manual_seed(0)
        rewards, values = torch.randn(2, replies, tokens, generator=rng).mul_(0.1).to(device)
        return Replies(rewards, values, torch.ones_like(rewards))


def errors_of(found: Pair, batch: Replies) -> dict[str, float]:
    """Largest distance from float64, relative to the size of the advantages."""
    rewards, values = batch.rewards.double(), batch.values.double()
    right, last = torch.empty_like(values), torch.zeros_like(values[:, 0])
    after = torch.zeros_like(last)
    for t in reversed(range(values.shape[1])):
        last = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAM * last
        after, right[:, t] = values[:, t], last
    scale = right.abs().max()
    return {
        "advantages": ((found[0].double() - right).abs().max() / scale).item(),
        "returns": ((found[1].double() - right - values).abs().max() / scale).item(),
    }


def judge_for(batch: Replies) -> Judge:
    """Who holds advantages and returns of these replies to the truth."""

    def judge(found: Pair) -> tuple[dict[str, float], str]:
        errors = errors_of(found, batch)
        return errors, verdict(errors)

    return judge


def verdict(errors: dict[str, float]) -> str:
    over = [name for name, x in errors.items() if not x <= 1e-5]
    return f"wrong: {', '.join(over)}" if over else "ok"
