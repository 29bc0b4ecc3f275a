"""The one engine: rows of a linear head -> per-token statistics, and back. It has never heard of PPO."""

from rlhf_kernels.engine.compiled import compilable_loss
from rlhf_kernels.engine.fused import fused_loss
from rlhf_kernels.engine.op import kl_divergence, token_logps, token_stats, token_stats_from_logits
from rlhf_kernels.engine.warmup import warmup

__all__ = [
    "compilable_loss",
    "fused_loss",
    "kl_divergence",
    "token_logps",
    "token_stats",
    "token_stats_from_logits",
    "warmup",
]
