"""PPO with a value model and a KL penalty in the reward.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

import rlhf_kernels as rk
from trainer import rl
from trainer.aspects import aspects_of
from trainer.defaults import AUTO, Auto, decided
from trainer.experience import Experience, objective
from trainer.log import RunLog
from trainer.models import Policy, ScalarModel, scalar_from
from trainer.rewards import is_model
from trainer.rl_config import RLConfig
from trainer.rl_method import Method, Totals, policy_loss
from trainer.shared_value import SharedValue
from trainer.stage import generator, scalar_for

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


def train(
    cfg: PPOConfig,
    log: RunLog | None = None,
    *,
    name: str = "ppo",
    evaluate: Callable[[Policy], dict[str, float]] | None = None,
    resume: bool = False,
) -> Policy:
    """Trains a policy and a value model; see ``rl.train``."""
    return rl.train(cfg, PPO(cfg), log, name=name, evaluate=evaluate, resume=resume)


class PPO(Method):
    """Generalised advantages from a value model, which learns beside the policy.

    Raises:
        ValueError: An option without a meaning; names it, what it got and what it wants.
    """

    def __init__(self, cfg: PPOConfig) -> None:
        self.cfg, self.shared = (cfg := decided(cfg)), None
        for name in ("gamma", "lam"):
            if not 0 <= getattr(cfg, name) <= 1:
                raise ValueError(f"{name}: got {getattr(cfg, name)}, want a number from 0 to 1")
        for name in ("value_lr", "value_clip"):
            if (x := getattr(cfg, name)) is not None and not x > 0:
                raise ValueError(f"{name}: got {x}, want a positive number")
        if not cfg.value_coef >= 0:
            raise ValueError(f"value_coef: got {cfg.value_coef}, want zero or more")

    def value_model(self, policy: Policy, texts: list[str]) -> ScalarModel | SharedValue:
        """Its head starts at zero: a reward model's head speaks of finished responses, and in raw scores."""
        if self.cfg.value_model == SHARED:
            self.shared = SharedValue(policy)
            return self.shared
        cfg, device, vocabulary = self.cfg, policy.weight.device, policy.tokenizer.get_vocab()
        rewarding = [s for aspect in aspects_of(cfg.reward) for s in aspect.sources if is_model(s)]
        start = cfg.value_model or (rewarding[0] if rewarding else cfg.model)
        value = scalar_for(cfg, start, texts, device)
        if value.tokenizer.get_vocab() != vocabulary:  # it reads the policy's token ids
            if cfg.value_model:
                raise ValueError(f"value_model: want the tokenizer of the policy, {cfg.value_model} has another")
            value = scalar_from(policy, generator(cfg, 7)).to(device)
        torch.nn.init.zeros_(value.head.weight)
        return value

    def advantages(self, batch: Experience, beta: float) -> tuple[Experience | None, dict[str, float]]:
        """GAE of the per-token rewards, whitened over the whole rollout."""
        cfg = self.cfg
        found = batch.ended() if cfg.truncation == "mask" else batch
        if found is None or found.values is None:
            return None, {}
        packed, values, mask = found.packed, found.values, found.packed.mask
        bootstrap = None
        if cfg.truncation == "bootstrap":
            bootstrap = torch.where(found.truncated, values[packed.last_rows], 0.0)
        price = beta if cfg.kl_in == "reward" else 0.0
        rewards, kl = rk.shaped_rewards(
            found.scores, found.old_logp, found.ref_logp, packed.cu_seqlens, beta=price, mask=mask, kl="k1"
        )
        advantages, returns = rk.gae(
            rewards, values, packed.cu_seqlens, gamma=cfg.gamma, lam=cfg.lam, mask=mask, bootstrap=bootstrap
        )
        kept, error = returns[mask], (returns - values)[mask]
        metrics = objective(found, kl, beta) | {
            "val/explained_var": float(1 - error.var(unbiased=False) / kept.var(unbiased=False).clamp(min=1e-8))
        }
        return replace(found, advantages=rk.whiten(advantages, mask), returns=returns), metrics

    def policy_loss(self, policy: Policy, part: Experience, totals: Totals, beta: float) -> rk.LossOutput:
        """The mean over all tokens of the minibatch, with the value loss where both share a backbone."""
        if self.shared is None:
            return policy_loss(self.cfg, policy, part, totals, beta)
        hidden = policy.hidden(part.packed)
        mine = policy_loss(self.cfg, policy, part, totals, beta, hidden)
        theirs = self._squares(self.shared.of(hidden), part, totals)
        # Metrics are averaged by tokens, and this one is a share of the whole already.
        square = theirs.loss.detach() * (totals.tokens / max(int(part.packed.mask.sum()), 1))
        metrics = {"value/" + k: v for k, v in theirs.metrics.items()} | {"value/loss": square}
        metrics["added"] = self.cfg.value_coef * square
        return rk.LossOutput(mine.loss + self.cfg.value_coef * theirs.loss, mine.metrics | metrics)

    def value_loss(self, value: ScalarModel, part: Experience, totals: Totals) -> rk.LossOutput:
        """Clipped squared error, the mean over all tokens of the minibatch."""
        return self._squares(value.values(part.packed), part, totals)

    def _squares(self, values: torch.Tensor, part: Experience, totals: Totals) -> rk.LossOutput:
        assert part.returns is not None
        return rk.value_loss(
            values, part.returns,
            old_values=part.values, clip=self.cfg.value_clip, mask=part.packed.mask, num_tokens=totals.tokens,
        )  # fmt: skip
