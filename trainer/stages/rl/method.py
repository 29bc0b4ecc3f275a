"""What an RL stage brings to the loop: where advantages come from, and what an update minimises."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import rlhf_kernels as rk
from trainer.models.policy import Policy, ScalarModel
from trainer.stages.rl.experience import Experience
from trainer.stages.rl.options import RLConfig
from trainer.stages.rl.shared_value import SharedValue
from trainer.training.gradients import Terms


class StepTotals(NamedTuple):
    """Denominators of one optimizer step, known before its first micro-batch."""

    tokens: int
    sequences: int


class RLMethod:
    """What one algorithm adds to the loop."""

    per_prompt = 1
    """Responses to each prompt of a rollout."""

    def nothing_in(self, scores: Tensor) -> bool:
        """Whether the scores of a rollout, [S] as the policy gets them, leave nothing to learn. A value model learns
        from any.
        """
        return False

    def advantages(self, batch: Experience, kl_coef: float) -> tuple[Experience | None, dict[str, float]]:
        """The experience with advantages, None if nothing is left to learn from; and what to log.

        Args:
            batch: Of ``collect``; the ``per_prompt`` responses to a prompt follow each other.
            kl_coef: The price of a nat between policy and reference, as the controller has it now.
        """
        raise NotImplementedError

    def policy_loss(
        self,
        policy: Policy,
        part: Experience,
        totals: StepTotals,
        kl_coef: float,
        shared: SharedValue | None = None,
    ) -> Terms:
        """Loss of one micro-batch under the denominators of its minibatch; its term ``policy`` is logged as such.

        Args:
            policy: In training.
            part: The micro-batch.
            totals: Denominators of the whole minibatch.
            kl_coef: The price of a nat, as for ``advantages``.
            shared: The value model, where it is a head on the policy's backbone and learns with it.
        """
        raise NotImplementedError

    def value_loss(self, value: ScalarModel, part: Experience, totals: StepTotals) -> rk.LossOutput:
        """The same for the value model, where there is one."""
        raise NotImplementedError


def kl_prices(cfg: RLConfig, kl_coef: float) -> tuple[float, float]:
    """The price of a nat in the reward, and in the loss: ``kl_in`` says where it is paid."""
    return (kl_coef, 0.0) if cfg.kl_in == "reward" else (0.0, kl_coef)


def kl_shaped(cfg: RLConfig, batch: Experience, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Rewards per token [N], less the price of the KL where the reward pays it, and the KL of each response [S]."""
    in_reward, _ = kl_prices(cfg, kl_coef)
    packed = batch.packed
    return rk.shaped_rewards(
        batch.scores, batch.old_logp, batch.ref_logp, packed.cu_seqlens, beta=in_reward, mask=packed.mask, kl="k1"
    )


def clipped_loss(
    cfg: RLConfig,
    policy: Policy,
    part: Experience,
    totals: StepTotals,
    kl_coef: float,
    hidden: Tensor | None = None,
    **options: Any,
) -> rk.LossOutput:
    """The clipped policy loss of one micro-batch, as all stages have it.

    ``hidden`` is what the policy makes of it, where that is known; ``options`` of ``rk.ppo_loss`` say what differs.
    """
    assert part.advantages is not None
    hidden = policy.hidden(part.packed) if hidden is None else hidden
    if part.token_weight is not None:
        options["token_weight"] = part.token_weight
    if cfg.kl_in == "loss":
        options |= {"ref_logp": part.ref_logp, "kl_coef": kl_prices(cfg, kl_coef)[1], "kl": cfg.kl}
    return rk.ppo_loss(
        hidden, policy.weight, part.packed.targets, part.old_logp, part.advantages,
        clip=cfg.clip, entropy_coef=cfg.entropy_coef, num_tokens=totals.tokens, num_sequences=totals.sequences,
        cu_seqlens=part.packed.cu_seqlens, temperature=cfg.temperature, **options, **policy.head,
    )  # fmt: skip
