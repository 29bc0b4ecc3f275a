"""The oracle: every function of the front door again, materialised, in float64, in the words of the papers.

It imports torch only and shares no code with what it judges. Slow on purpose: loops over sequences, whole logits.
"""

from rlhf_kernels.reference.advantages import gae, group_advantages, shaped_rewards, whiten
from rlhf_kernels.reference.head import Stats, kl_divergence, materialised_logits, token_logps, token_stats
from rlhf_kernels.reference.losses import grpo_loss, ppo_loss, sft_loss
from rlhf_kernels.reference.preferences import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf_kernels.reference.rewards import bradley_terry_loss, infonce_loss, plackett_luce_loss, value_loss

__all__ = [
    "Stats",
    "bradley_terry_loss",
    "dpo_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "infonce_loss",
    "ipo_loss",
    "kl_divergence",
    "kto_loss",
    "materialised_logits",
    "orpo_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "sft_loss",
    "shaped_rewards",
    "simpo_loss",
    "token_logps",
    "token_stats",
    "value_loss",
    "whiten",
]
