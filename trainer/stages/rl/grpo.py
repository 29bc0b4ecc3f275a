"""GRPO and its relatives: no value model, a response is compared with others to the same prompt.

One loop, one loss; what differs is what a score is compared with, what the difference is divided by, and how tokens
are averaged:

=================  =========================================  ==============  =============  =============
                   paper                                      baseline        scale          reduction
=================  =========================================  ==============  =============  =============
GRPO               https://arxiv.org/abs/2402.03300           mean            group_std      sequence_mean
Dr.GRPO            https://arxiv.org/abs/2503.20783           mean            none           constant
DAPO's loss        https://arxiv.org/abs/2503.14476           mean            group_std      token_mean
RLOO               https://arxiv.org/abs/2402.14740           leave_one_out   none           sequence_sum
REINFORCE++        https://arxiv.org/abs/2501.03262           batch           batch_std      token_mean
GSPO               https://arxiv.org/abs/2507.18071           mean            group_std      sequence_mean
=================  =========================================  ==============  =============  =============

DAPO also widens the clip upwards (``clip 0.2 0.28``), GSPO takes ratios of whole sequences (``ratio sequence``,
``clip 3e-4 4e-4``), RLOO and REINFORCE++ pay for the KL in the reward (``kl_in reward``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import rlhf_kernels as rk
from trainer.models.policy import Policy
from trainer.rewards import truncation
from trainer.stages.rl.experience import Experience, objective
from trainer.stages.rl.method import RLMethod, StepTotals, clipped_loss, kl_prices, kl_shaped
from trainer.stages.rl.options import RLConfig
from trainer.stages.rl.shared_value import SharedValue
from trainer.training.gradients import Terms


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RLConfig):
    """GRPO and its relatives on {"prompt", ...} records; the other fields go to a reward function."""

    num_generations: int = 8
    """Responses to each prompt."""
    batch_size: int = 16
    """Prompts per rollout, each with num_generations responses."""
    kl_coef: float = 0.04
    """Price of a nat between policy and reference."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where that price is paid: out of the reward, or as a term of the loss."""
    baseline: Literal["mean", "leave_one_out", "batch"] = "mean"
    """What a score is compared with: the mean of its group, of the others in it, or of the whole rollout."""
    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """What the difference is divided by: the deviation of the group's scores, of all of the rollout's, or nothing."""
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How tokens are averaged: alike, within responses first, summed in responses, or over max_new_tokens each."""
    ratio: Literal["token", "sequence"] = "token"
    """Of policies, clipped token by token, or the geometric mean over each response."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative, above one; None is without bound."""
    truncation: Literal["keep", "penalise", "mask"] = "keep"
    """A response cut off by the limit: like any other, gets a fixed score, or is left out of the loss."""


class GRPO(RLMethod):
    """Advantages from scores alone.

    Raises:
        ValueError: The configuration compares responses with nothing, or an option has no meaning.
    """

    def __init__(self, cfg: GRPOConfig) -> None:
        self.cfg, self.per_prompt = cfg, cfg.num_generations
        if cfg.num_generations < (1 if cfg.baseline == "batch" else 2):
            raise ValueError(
                f"num_generations: got {cfg.num_generations}, want at least 2, so that there is a group to compare "
                "with; baseline=batch works with one"
            )
        if cfg.dual_clip is not None and not cfg.dual_clip > 1:
            raise ValueError(f"dual_clip: got {cfg.dual_clip}, want a ratio above one, or None")
        if cfg.baseline == "batch" and cfg.scale == "group_std":
            raise ValueError("scale: got group_std, want batch_std or none with baseline=batch, which knows no groups")

    def nothing_in(self, scores: Tensor) -> bool:
        """Whether every advantage would be zero. Then the KL to the reference would be all that is left to learn, and
        Adam would make full steps of its rounding; what asks for steps without a reward gets them.
        """
        cfg = self.cfg
        if cfg.entropy_coef or cfg.ptx_coef:
            return False
        groups = scores.view(1, -1) if cfg.baseline == "batch" else scores.view(-1, cfg.num_generations)
        return bool((groups == groups[:, :1]).all())

    def advantages(self, batch: Experience, kl_coef: float) -> tuple[Experience | None, dict[str, float]]:
        """One advantage per response, on each of its tokens; truncated ones count in the baseline, masked or not."""
        cfg, packed, mask = self.cfg, batch.packed, batch.packed.mask
        rewards, kl = kl_shaped(cfg, batch, kl_coef)
        if cfg.baseline == "batch":
            # What is left to be earned from each token on: later tokens have less KL to pay.
            ahead, _ = rk.gae(rewards, torch.zeros_like(rewards), packed.cu_seqlens, gamma=1.0, lam=1.0, mask=mask)
            mean = ahead.sum() / mask.sum()
            advantages = rk.whiten(ahead, mask) if cfg.scale == "batch_std" else torch.where(mask, ahead - mean, 0.0)
        else:
            scale = None if cfg.scale == "none" else cfg.scale
            in_reward, _ = kl_prices(cfg, kl_coef)
            each = rk.group_advantages(
                batch.scores - in_reward * kl, cfg.num_generations, baseline=cfg.baseline, scale=scale
            )
            advantages = torch.where(mask, per_row(each, packed.lengths), 0.0)
        metrics = objective(batch, kl, kl_coef)
        groups = batch.scores.view(-1, cfg.num_generations)
        metrics["frac_reward_zero_std"] = float((groups == groups[:, :1]).all(1).float().mean())
        metrics["policy/no_difference"] = 0.0
        found = replace(batch, advantages=advantages)
        return found.kept(truncation.in_loss(cfg, found.truncated)), metrics

    def policy_loss(
        self,
        policy: Policy,
        part: Experience,
        totals: StepTotals,
        kl_coef: float,
        shared: SharedValue | None = None,
    ) -> Terms:
        """Reduced as the configuration says, under the denominators of the minibatch."""
        cfg = self.cfg
        options: dict[str, Any] = {"ratio": cfg.ratio, "dual_clip": cfg.dual_clip, "reduction": cfg.reduction}
        if cfg.reduction == "constant":
            options["reduction"] = "token_mean"
            totals = StepTotals(totals.sequences * cfg.max_new_tokens, totals.sequences)
        out = clipped_loss(cfg, policy, part, totals, kl_coef, **options)
        return Terms({"policy": (1.0, out.loss)}, out.metrics)


def per_row(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[S] to [N]: one value for every row of each sequence."""
    return x.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=sum(lengths))
