"""PPO with a value model and a KL penalty in the reward.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

import rlhf_kernels as rk
from trainer.models.policy import Policy, ScalarModel
from trainer.rewards import truncation
from trainer.stages.rl.experience import Experience, objective
from trainer.stages.rl.method import RLMethod, StepTotals, clipped_loss, kl_shaped
from trainer.stages.rl.options import RLConfig
from trainer.stages.rl.shared_value import SharedValue
from trainer.training.gradients import Terms
from trainer.training.options import AUTO, Auto

SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RLConfig):
    """PPO on {"prompt", ...} records; the other fields go to a reward function."""

    value_model: str | None = None
    """Where the value model starts; by default from the first reward model, or from the policy if there is none.
    "shared" is a head on the policy's own backbone: half the memory and time, but the losses compete for it."""
    value_coef: float = 0.5
    """Weight of the value loss on a shared backbone."""
    value_lr: Auto[float] = AUTO
    """Peak learning rate of a value model of its own."""
    value_clip: float | None = 0.2
    """How far a value may move from the sampled one; None is as far as it likes."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    truncation: Literal["penalise", "bootstrap", "mask"] = "penalise"
    """A response cut off by the limit: gets a fixed score, has its future estimated, or is left out of the loss."""


class PPO(RLMethod):
    """Generalised advantages from a value model, which learns beside the policy.

    Raises:
        ValueError: An option without a meaning; names it, what it got and what it wants.
    """

    def __init__(self, cfg: PPOConfig) -> None:
        self.cfg = cfg
        for name in ("gamma", "lam"):
            if not 0 <= getattr(cfg, name) <= 1:
                raise ValueError(f"{name}: got {getattr(cfg, name)}, want a number from 0 to 1")
        for name in ("value_lr", "value_clip"):
            if (x := getattr(cfg, name)) not in (None, AUTO) and not x > 0:
                raise ValueError(f"{name}: got {x}, want a positive number")
        if not cfg.value_coef >= 0:
            raise ValueError(f"value_coef: got {cfg.value_coef}, want zero or more")

    def advantages(self, batch: Experience, kl_coef: float) -> tuple[Experience | None, dict[str, float]]:
        """GAE of the per-token rewards, whitened over the whole rollout."""
        cfg = self.cfg
        found = batch.kept(truncation.in_loss(cfg, batch.truncated))
        if found is None or found.values is None:
            return None, {}
        packed, values, mask = found.packed, found.values, found.packed.mask
        rewards, kl = kl_shaped(cfg, found, kl_coef)
        ahead = truncation.bootstrap(cfg, found.truncated, values[packed.last_rows])
        advantages, returns = rk.gae(
            rewards, values, packed.cu_seqlens, gamma=cfg.gamma, lam=cfg.lam, mask=mask, bootstrap=ahead
        )
        kept, error = returns[mask], (returns - values)[mask]
        metrics = objective(found, kl, kl_coef) | {
            "val/explained_var": float(1 - error.var(unbiased=False) / kept.var(unbiased=False).clamp(min=1e-8))
        }
        return replace(found, advantages=rk.whiten(advantages, mask), returns=returns), metrics

    def policy_loss(
        self,
        policy: Policy,
        part: Experience,
        totals: StepTotals,
        kl_coef: float,
        shared: SharedValue | None = None,
    ) -> Terms:
        """The mean over all tokens of the minibatch, with the value loss where both share a backbone."""
        hidden = policy.hidden(part.packed)
        mine = clipped_loss(self.cfg, policy, part, totals, kl_coef, hidden)
        terms, metrics = {"policy": (1.0, mine.loss)}, dict(mine.metrics)
        if shared is not None:
            theirs = self._squares(shared.of(hidden), part, totals)
            terms["value/loss"] = (self.cfg.value_coef, theirs.loss)
            metrics |= {"value/" + k: v for k, v in theirs.metrics.items()}
        return Terms(terms, metrics)

    def value_loss(self, value: ScalarModel, part: Experience, totals: StepTotals) -> rk.LossOutput:
        """Clipped squared error, the mean over all tokens of the minibatch."""
        return self._squares(value.values(part.packed), part, totals)

    def _squares(self, values: Tensor, part: Experience, totals: StepTotals) -> rk.LossOutput:
        assert part.returns is not None
        return rk.value_loss(
            values, part.returns,
            old_values=part.values, clip=self.cfg.value_clip, mask=part.packed.mask, num_tokens=totals.tokens,
        )  # fmt: skip
