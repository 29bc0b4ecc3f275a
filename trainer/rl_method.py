"""What an RL stage brings to the loop in ``trainer.rl``: where advantages come from, and what an update minimises."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

import rlhf_kernels as rk
from trainer.experience import Experience
from trainer.models import Policy, ScalarModel
from trainer.rl_config import RLConfig
from trainer.shared_value import SharedValue


class Totals(NamedTuple):
    """Denominators of one optimizer step, known before its first micro-batch."""

    tokens: int
    sequences: int


class Method:
    """What one stage adds to the loop; the defaults are those of a stage without a value model."""

    per_prompt = 1  # responses to each prompt of a rollout

    def value_model(self, policy: Policy, texts: list[str]) -> ScalarModel | SharedValue | None:
        """The model to be trained beside the policy."""
        return None

    def trained(self, policy: Policy, value: ScalarModel | SharedValue | None) -> nn.Module:
        """What the policy's optimizer moves: a value head that shares the backbone goes with it."""
        return nn.ModuleList([policy, value]) if isinstance(value, SharedValue) else policy

    def nothing_in(self, scores: Tensor) -> bool:
        """Whether the scores of a rollout, [S] as the policy gets them, leave nothing to learn. A value model learns
        from any.
        """
        return False

    def advantages(self, batch: Experience, beta: float) -> tuple[Experience | None, dict[str, float]]:
        """The experience with advantages, None if nothing is left to learn from; and what to log.

        Args:
            batch: Of ``collect``; the ``per_prompt`` responses to a prompt follow each other.
            beta: The coefficient of the KL.
        """
        raise NotImplementedError

    def policy_loss(self, policy: Policy, part: Experience, totals: Totals, beta: float) -> rk.LossOutput:
        """Loss of one micro-batch under the denominators of its minibatch."""
        raise NotImplementedError

    def value_loss(self, value: ScalarModel, part: Experience, totals: Totals) -> rk.LossOutput:
        """The same for the value model, where there is one."""
        raise NotImplementedError


def policy_loss(
    cfg: RLConfig,
    policy: Policy,
    part: Experience,
    totals: Totals,
    beta: float,
    hidden: Tensor | None = None,
    **options: Any,
) -> rk.LossOutput:
    """Clipped loss of one micro-batch, as all stages have it.

    ``hidden`` is what the policy makes of it, where that is known; ``options`` of ``rk.ppo_loss`` say what differs.
    """
    assert part.advantages is not None
    hidden = policy.hidden(part.packed) if hidden is None else hidden
    if part.token_weight is not None:
        options["token_weight"] = part.token_weight
    if cfg.kl_in == "loss":
        options |= {"ref_logp": part.ref_logp, "kl_coef": beta, "kl": cfg.kl}
    return rk.ppo_loss(
        hidden, policy.weight, part.packed.targets, part.old_logp, part.advantages,
        clip=cfg.clip, entropy_coef=cfg.entropy_coef, num_tokens=totals.tokens, num_sequences=totals.sequences,
        cu_seqlens=part.packed.cu_seqlens, temperature=cfg.temperature, **options, **policy.head,
    )  # fmt: skip
