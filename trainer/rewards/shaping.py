"""What becomes of a score before the policy gets it: every change of a reward happens here, in this order.

Each aspect: its ensemble is combined, it is normalised, clipped and weighted. Their sum: shared out per token, shaped
by length and by whether the response ended; and last a truncated response may get a fixed score instead
(``rewards.truncation``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from trainer.rewards import truncation
from trainer.training.options import AUTO, Auto, TokenConfig


@dataclass(frozen=True, kw_only=True)
class RewardOptions(TokenConfig):
    """Options of rewards."""

    reward: str | tuple[str, ...]
    """A reward model's folder, module:function, compare:module:function, http://..., or "exact_answer"; or several,
    each as [NAME=]SOURCE[@WEIGHT]. SOURCE,SOURCE is an ensemble."""
    ensemble: Literal["mean", "worst", "penalised"] = "mean"
    """Of an ensemble counts the mean, the lowest score, or the mean less ensemble_penalty times the variance."""
    ensemble_penalty: float = 0.5
    """What a unit of variance between members costs."""
    reward_normalize: bool = False
    """Give every aspect mean 0 and deviation 1 over each rollout, so that weights compare like with like."""
    reward_clip: float | None = None
    """Keeps every aspect between plus and minus this."""
    reward_per_token: bool = False
    """Divide the score by the number of tokens of the response."""
    length_coef: float = 0.0
    """Added to the score per token of the response; negative makes length cost."""
    overlong_tokens: int = 0
    """Within this many tokens of the limit the score falls linearly, by one at the limit."""
    eos_bonus: float = 0.0
    """Added to the score of a response that ended by itself."""
    truncation: str = "penalise"
    """What becomes of a response that the limit cut off."""
    truncation_score: float | None = None
    """The fixed score of a penalised one; by default -2 (deviations) where only reward models judge, otherwise the
    lowest score of the rollout, since only the author of a function knows its scale."""
    max_new_tokens: Auto[int] = AUTO
    """Longest response."""


class Scored(NamedTuple):
    """What the rewards say about a rollout."""

    scores: Tensor
    """[S], one per response."""
    metrics: dict[str, float]
    """What is to be logged beside their mean: ``rewards/NAME`` and ``rewards/NAME_std`` of each aspect before weights,
    where there are several, and ``rewards/NAME_spread``, the deviation between members of an ensemble."""


def combined(cfg: RewardOptions, members: Tensor) -> Tensor:
    """One score per response from an ensemble, [M, S] to [S].

    Coste et al. 2023, https://arxiv.org/abs/2310.02743, section 3: the worst case is conservative, the penalty of the
    variance less so; both slow down over-optimisation of what single members get wrong.
    """
    if cfg.ensemble == "worst":
        return members.min(0).values
    if cfg.ensemble == "penalised":
        return members.mean(0) - cfg.ensemble_penalty * members.var(0, unbiased=False)
    return members.mean(0)


def ranged(cfg: RewardOptions, scores: Tensor) -> Tensor:
    """One aspect, [S], in its range. Scores that are all alike become zero where they are normalised."""
    if cfg.reward_normalize:
        scores = (scores - scores.mean()) / (scores.std(unbiased=False) + 1e-6)
    return scores if cfg.reward_clip is None else scores.clamp(-cfg.reward_clip, cfg.reward_clip)


def shaped(cfg: RewardOptions, scores: Tensor, lengths: Tensor, truncated: Tensor) -> Tensor:
    """The sum of all aspects as the policy gets it.

    Args:
        cfg: Says what to do; by default only truncated responses change.
        scores: [S].
        lengths: [S] tokens per response, its end included.
        truncated: [S] bool.

    Example:
        >>> cfg = RewardOptions(data="d.jsonl", reward="f", length_coef=-0.1, eos_bonus=1.0)  # type: ignore[arg-type]
        >>> shaped(cfg, torch.tensor([1.0, 0.0, 3.0]), torch.tensor([5, 8, 9]), torch.tensor([False, False, True]))
        tensor([1.5000, 0.2000, 0.2000])
    """
    if cfg.reward_per_token:
        scores = scores / lengths.clamp(min=1)
    if cfg.length_coef:
        scores = scores + cfg.length_coef * lengths
    if cfg.overlong_tokens:
        over = lengths - (cfg.max_new_tokens - cfg.overlong_tokens)
        scores = scores - (over / cfg.overlong_tokens).clamp(0, 1)
    return truncation.scored(cfg, scores, truncated)


def check_rewards(cfg: RewardOptions) -> None:
    """Refuses values without a meaning.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    if not cfg.ensemble_penalty >= 0:
        raise ValueError(f"ensemble_penalty: got {cfg.ensemble_penalty}, want zero or more")
    if cfg.reward_clip is not None and not cfg.reward_clip > 0:
        raise ValueError(f"reward_clip: got {cfg.reward_clip}, want a positive number, or None")
    if not 0 <= cfg.overlong_tokens <= cfg.max_new_tokens:
        raise ValueError(f"overlong_tokens: got {cfg.overlong_tokens}, want 0 to max_new_tokens={cfg.max_new_tokens}")
