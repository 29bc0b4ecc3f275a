"""Several named rewards at once, each kept in its range and logged apart, so that trade-offs show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.rewards.names import aspects_of
from trainer.rewards.shaping import RewardOptions, Scored, combined, ranged
from trainer.rewards.sources import Reward, reward_from
from trainer.sampling.rollout import Rollout


class Rewards:
    """The weighted sum of all aspects.

    Args:
        cfg: Names the rewards and says how they are combined.
        tokenizer: Of the policy.
        device: Where reward models go.
    """

    def __init__(self, cfg: RewardOptions, tokenizer: Any, device: torch.device) -> None:
        self.cfg = cfg
        self.aspects = aspects_of(cfg.reward)
        options: dict[str, Any] = {"max_length": cfg.max_length, "max_tokens": cfg.max_tokens, "device": device}
        self.sources: list[list[Reward]] = [
            [reward_from(source, tokenizer, **options) for source in aspect.sources] for aspect in self.aspects
        ]

    def __call__(self, rollout: Rollout, records: Sequence[dict[str, Any]]) -> Scored:
        """Scores [S] float32, and what to log about the aspects."""
        logged: dict[str, float] = {}
        total: Tensor | None = None
        for aspect, sources in zip(self.aspects, self.sources, strict=True):
            members = [source(rollout, records) for source in sources]
            scores = members[0]
            if len(members) > 1:
                stacked = torch.stack([x.to(scores.device) for x in members])
                scores = combined(self.cfg, stacked)
                logged[f"rewards/{aspect.name}_spread"] = float(stacked.std(0, unbiased=False).mean())
            if len(self.aspects) > 1:
                logged[f"rewards/{aspect.name}"] = float(scores.mean())
                logged[f"rewards/{aspect.name}_std"] = float(scores.std(unbiased=False))
            part = aspect.weight * ranged(self.cfg, scores)
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return Scored(total, logged)
