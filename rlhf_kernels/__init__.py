"""rlhf_kernels: from hidden states to losses and gradients, without the logits. This file is the front door."""

from rlhf_kernels.advantages import gae, group_advantages, shaped_rewards, whiten
from rlhf_kernels.backends import backends
from rlhf_kernels.engine import fused_loss, kl_divergence, token_logps, token_stats, token_stats_from_logits, warmup
from rlhf_kernels.losses import (
    bradley_terry_loss,
    dpo_loss,
    grpo_loss,
    infonce_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_loss,
    ppo_loss,
    sft_loss,
    simpo_loss,
    value_loss,
)
from rlhf_kernels.types import HeadOptions, LossOutput, TokenStats

__version__ = "0.1.0"
__all__ = [
    "HeadOptions",
    "LossOutput",
    "TokenStats",
    "backends",
    "bradley_terry_loss",
    "dpo_loss",
    "fused_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "infonce_loss",
    "ipo_loss",
    "kl_divergence",
    "kto_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "sft_loss",
    "shaped_rewards",
    "simpo_loss",
    "token_logps",
    "token_stats",
    "token_stats_from_logits",
    "value_loss",
    "warmup",
    "whiten",
]
