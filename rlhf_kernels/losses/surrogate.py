"""What policy-gradient losses are combined from: ratio kinds, clip rules, regularisers; per token, before reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels.checks import is_finite, is_number, one_of, wants
from rlhf_kernels.estimators import check_loss_term, kl_estimate, safe_exp
from rlhf_kernels.losses.reduce import metric
from rlhf_kernels.segments import segment_sum, spread
from rlhf_kernels.types import TokenStats

Metrics = dict[str, tuple[Tensor, Tensor]]


def importance_ratio(log_ratio: Tensor, cu_seqlens: Tensor | None, kind: str) -> Tensor:
    """[n] ratios of policy to sampling policy: each token's own, or its sequence's.

    The sequence ratio is the geometric mean over the sequence's tokens (GSPO, https://arxiv.org/abs/2507.18071, Eq. 7)
    in the token form of Eq. 14: its value is the sequence's, its gradient flows through the token alone. With one
    advantage per sequence both forms have the same gradient; with one per token only this form has a meaning.
    """
    if kind == "token":
        return safe_exp(log_ratio)
    assert cu_seqlens is not None
    frozen = log_ratio.detach()
    mean = segment_sum(frozen, cu_seqlens) / cu_seqlens.diff().clamp(min=1)
    return safe_exp(spread(mean, cu_seqlens, frozen.numel()) + (log_ratio - frozen))


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip: tuple[float, float], dual_clip: float | None
) -> tuple[Tensor, Metrics]:
    """-min(r A, clip(r) A), and where A < 0 never more than -c A; exactly flat wherever a bound holds."""
    low, high = 1 - clip[0], 1 + clip[1]
    above, below = (ratio > high) & (advantages > 0), (ratio < low) & (advantages < 0)
    bounded = ratio.masked_fill(above, high).masked_fill(below, low)
    metrics = {"clipfrac_low": metric(below), "clipfrac_high": metric(above)}
    active = above | below
    if dual_clip is not None:
        capped = (ratio > dual_clip) & (advantages < 0)
        bounded, active = bounded.masked_fill(capped, dual_clip), active | capped
        metrics["clipfrac_dual"] = metric(capped)
    return -advantages * bounded, {"clipfrac": metric(active), **metrics}


def cispo_surrogate(
    ratio: Tensor, logp: Tensor, advantages: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Metrics]:
    """-sg(clip(r)) A logp: the bound caps a weight and never silences a token."""
    low, high = 1 - clip[0], 1 + clip[1]
    below, above = ratio < low, ratio > high
    metrics = {"clipfrac": metric(below | above), "clipfrac_low": metric(below), "clipfrac_high": metric(above)}
    return -ratio.detach().clamp(low, high) * advantages * logp, metrics


@dataclass(frozen=True)
class PolicyTerms:
    """The choices of a policy-gradient loss, checked once."""

    clip: tuple[float, float]
    dual_clip: float | None
    clip_rule: str
    ratio: str
    entropy_coef: float
    kl_coef: float
    kl: str

    def __post_init__(self) -> None:
        pair = isinstance(self.clip, (tuple, list)) and len(self.clip) == 2 and all(map(is_number, self.clip))
        wants(
            pair and min(self.clip) >= 0,
            "clip",
            self.clip,
            "two distances from a ratio of one, below and above it, as (0.2, 0.28)",
        )
        one_of("clip_rule", self.clip_rule, ("ppo", "cispo"))
        one_of("ratio", self.ratio, ("token", "sequence"))
        if self.dual_clip is not None:
            wants(is_number(self.dual_clip) and self.dual_clip > 1, "dual_clip", self.dual_clip, "a number above one")
            wants(self.clip_rule == "ppo", "dual_clip", self.dual_clip, f"None with clip_rule={self.clip_rule!r}")
        wants(is_finite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        wants(is_finite(self.kl_coef) and self.kl_coef >= 0, "kl_coef", self.kl_coef, "a finite number, zero or more")
        check_loss_term(self.kl, self.kl_coef)

    def per_token(
        self,
        stats: TokenStats,
        cu_seqlens: Tensor | None,
        advantages: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
    ) -> tuple[Tensor, Metrics]:
        """[n] losses of kept tokens, and their metrics."""
        logp = stats.logp
        advantages = advantages.to(logp.dtype)
        log_ratio = logp - (logp.detach() if old_logp is None else old_logp.to(logp.dtype))
        ratio = importance_ratio(log_ratio, cu_seqlens, self.ratio)
        if self.clip_rule == "cispo":
            loss, metrics = cispo_surrogate(ratio, logp, advantages, self.clip)
        else:
            loss, metrics = clipped_surrogate(ratio, advantages, self.clip, self.dual_clip)
        # k3 seen from the sampler: it drew the tokens, so this is unbiased for KL(old | policy).
        metrics["approx_kl"] = metric(kl_estimate(-log_ratio.detach(), torch.zeros_like(logp), "k3"))
        metrics["ratio"], metrics["entropy"] = metric(ratio), metric(stats.entropy)

        kl = stats.kl if self.kl == "exact" else None
        if ref_logp is not None:
            kl = kl_estimate(logp, ref_logp, self.kl)
        if kl is not None:
            metrics["kl"] = metric(kl)
            loss = loss + self.kl_coef * kl if self.kl_coef else loss
        # Not "+ 0 * entropy": an entropy that nobody asked for would cost its own gradient.
        return (loss - self.entropy_coef * stats.entropy if self.entropy_coef else loss), metrics
