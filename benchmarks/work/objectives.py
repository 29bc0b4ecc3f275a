"""The losses as a user without this library writes them, over log-probabilities; float64 gives the truth."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.work.cases import BETA, CLIP, DUAL_CLIP, KTO_KL, Batch

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


def reinforced(logp: Tensor, _: Tensor | None, batch: Batch) -> Tensor:
    """What Liger's score centering returns without centering, under a correction that drops as PPO clips.

    Its gradient is that of ``clipped``, but for ratios beyond 3 under a negative advantage, which it drops, too. Its
    value is -A w logp, w being the ratio within the band and zero outside, instead of -A times the clipped ratio.
    """
    advantages = batch.advantages.to(logp.dtype)
    ratio = (logp - batch.old_logp.to(logp.dtype)).exp()
    within = torch.where(advantages >= 0, ratio <= 1 + CLIP[1], (ratio >= 1 - CLIP[0]) & (ratio <= DUAL_CLIP))
    gain = advantages * (ratio * within) * logp
    return -gain.masked_fill(~batch.kept, 0.0).sum() / batch.kept.sum()


def per_sequence(x: Tensor, batch: Batch) -> Tensor:
    """[S] sums over the kept tokens."""
    sums = x.new_zeros(batch.cu_seqlens.numel() - 1)
    return sums.index_add(0, batch.segments, x.masked_fill(~batch.kept, 0.0))


def _log_ratios(logp: Tensor, ref_logp: Tensor | None, batch: Batch) -> Tensor:
    assert ref_logp is not None
    return per_sequence(logp - ref_logp, batch)


def _kept_tokens(logp: Tensor, batch: Batch) -> Tensor:
    return per_sequence(torch.ones_like(logp), batch)


def preference(logp: Tensor, ref_logp: Tensor | None, batch: Batch) -> Tensor:
    """DPO, https://arxiv.org/abs/2305.18290, Eq. 7, over summed log-probabilities."""
    gain = BETA * _log_ratios(logp, ref_logp, batch)
    return -F.logsigmoid(gain[0::2] - gain[1::2]).mean()


def identity(logp: Tensor, ref_logp: Tensor | None, batch: Batch) -> Tensor:
    """IPO, https://arxiv.org/abs/2310.12036, Eq. 17, over means per reply as TRL takes them."""
    mean = _log_ratios(logp, ref_logp, batch) / _kept_tokens(logp, batch)
    return (mean[0::2] - mean[1::2] - 1 / (2 * BETA)).square().mean()


def unpaired(logp: Tensor, ref_logp: Tensor | None, batch: Batch) -> Tensor:
    """KTO, https://arxiv.org/abs/2402.01306, Eq. 8; every other reply is a desirable one."""
    over = _log_ratios(logp, ref_logp, batch) - KTO_KL
    sign = 1 - 2 * (torch.arange(len(over), device=over.device) % 2)
    return torch.sigmoid(-BETA * sign * over).mean()


def odds_ratio(logp: Tensor, _: Tensor | None, batch: Batch) -> Tensor:
    """ORPO, https://arxiv.org/abs/2403.07691, Eq. 6 and 7: the chosen replies' likelihood and the odds."""
    sums, tokens = per_sequence(logp, batch), _kept_tokens(logp, batch)
    mean = sums / tokens
    odds = mean - (-torch.expm1(mean)).log()
    return -sums[0::2].sum() / tokens[0::2].sum() - BETA * F.logsigmoid(odds[0::2] - odds[1::2]).mean()


def likelihood(logp: Tensor, _: Tensor | None, batch: Batch) -> Tensor:
    """Cross-entropy over the tokens kept."""
    return -logp.masked_fill(~batch.kept, 0.0).sum() / batch.kept.sum()


LOSSES: dict[str, Loss] = {
    "train": weighted,
    "grpo": clipped,
    "grpo_groups": clipped,
    "dpo": preference,
    "dpo_prompts": preference,
    "ipo": identity,
    "kto": unpaired,
    "orpo": odds_ratio,
    "sft": likelihood,
    "sparse": clipped,
    "sparse_kept": clipped,
}
