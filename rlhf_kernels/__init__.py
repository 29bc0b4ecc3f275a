"""rlhf_kernels: from hidden states to losses and gradients, without the logits. This file is the front door."""

from rlhf_kernels.backends import backends
from rlhf_kernels.engine import fused_loss, kl_divergence, token_logps, token_stats, token_stats_from_logits
from rlhf_kernels.types import HeadOptions, LossOutput, TokenStats

__version__ = "0.1.0"
__all__ = [
    "HeadOptions",
    "LossOutput",
    "TokenStats",
    "backends",
    "fused_loss",
    "kl_divergence",
    "token_logps",
    "token_stats",
    "token_stats_from_logits",
]
