"""The losses as a user without this library writes them, over log-probabilities; float64 gives the truth."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BETA, CLIP, Batch

Loss = Callable[[Tensor, Tensor | None, Batch], Tensor]  # (logp [N], reference's logp [N], batch) -> scalar


def weighted(logp: Tensor, _: Tensor | None, batch: Batch) -> Tensor:
    """Policy gradient without ratio: every token has its own weight and none is zero."""
    return -(batch.advantages.to(logp.dtype) * logp).mean()


def clipped(logp: Tensor, _: Tensor | None, batch: Batch) -> Tensor:
    """PPO, https://arxiv.org/abs/1707.06347, Eq. 7, averaged over the tokens kept."""
    advantages = batch.advantages.to(logp.dtype)
    ratio = (logp - batch.old_logp.to(logp.dtype)).exp()
    gain = (ratio * advantages).minimum(ratio.clamp(1 - CLIP[0], 1 + CLIP[1]) * advantages)
    return -gain.masked_fill(~batch.kept, 0.0).sum() / batch.kept.sum()


def preference(logp: Tensor, ref_logp: Tensor | None, batch: Batch) -> Tensor:
    """DPO, https://arxiv.org/abs/2305.18290, Eq. 7, over summed log-probabilities."""
    assert ref_logp is not None
    gain = BETA * (logp - ref_logp).masked_fill(~batch.kept, 0.0).view(batch.cu_seqlens.numel() - 1, -1).sum(1)
    return -F.logsigmoid(gain[0::2] - gain[1::2]).mean()


LOSSES: dict[str, Loss] = {
    "train": weighted,
    "grpo": clipped,
    "dpo": preference,
    "dpo_prompts": preference,
    "sparse": clipped,
    "sparse_kept": clipped,
}
