"""Every public loss; each is a pure function of token statistics, or of scores and values."""

from rlhf_kernels.losses.kto import kto_loss
from rlhf_kernels.losses.policy import grpo_loss, ppo_loss
from rlhf_kernels.losses.preference import dpo_loss, ipo_loss, orpo_loss, simpo_loss
from rlhf_kernels.losses.reward import bradley_terry_loss, infonce_loss, plackett_luce_loss
from rlhf_kernels.losses.sft import sft_loss
from rlhf_kernels.losses.value import value_loss

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "grpo_loss",
    "infonce_loss",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "ppo_loss",
    "sft_loss",
    "simpo_loss",
    "value_loss",
]
