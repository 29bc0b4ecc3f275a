"""What becomes of a response that the length limit cut off, and of one that ended by itself: all of it, in one place.

The option ``truncation`` names what happens to one that was cut off:

* ``keep``: it counts like any other.
* ``penalise``: its own score is replaced by a fixed one.
* ``mask``: it counts in baselines, and the loss leaves it out.
* ``bootstrap``: the value model estimates what would have come (PPO only).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

WORST = -2.0  # of normalised scores


class TruncationOptions(Protocol):
    """Those of the options of rewards that speak of ends."""

    @property
    def truncation(self) -> str: ...

    @property
    def truncation_score(self) -> float | None: ...

    @property
    def eos_bonus(self) -> float: ...


def fixed_score(cfg: TruncationOptions, *, only_models: bool) -> float | None:
    """The score of a penalised response; None is the lowest score of its rollout.

    Reward models give deviations from the mean of the policy that they were made for; of a function's scale nothing is
    known, and a fixed number could outweigh everything that it has to say.

    Args:
        cfg: ``truncation_score`` wins, where it is given.
        only_models: Whether nothing but reward models gives scores.
    """
    return WORST if cfg.truncation_score is None and only_models else cfg.truncation_score


def own_score_counts(cfg: TruncationOptions) -> bool:
    """Whether the rewards have a say about a response that was cut off."""
    return cfg.truncation != "penalise"


def scored(cfg: TruncationOptions, scores: Tensor, truncated: Tensor) -> Tensor:
    """Scores with the bonus of responses that ended, and the fixed score of those that are penalised.

    Args:
        cfg: Says what to do.
        scores: [S].
        truncated: [S] bool.
    """
    if cfg.eos_bonus:
        scores = scores + cfg.eos_bonus * (~truncated).to(scores.dtype)
    if own_score_counts(cfg):
        return scores
    worst = scores.min() if cfg.truncation_score is None else cfg.truncation_score
    return torch.where(truncated, worst, scores)


def in_loss(cfg: TruncationOptions, truncated: Tensor) -> list[int] | None:
    """Responses that the loss learns from, by their numbers; None stands for all of them.

    Args:
        cfg: Says what to do.
        truncated: [S] bool.
    """
    if cfg.truncation != "mask" or not bool(truncated.any()):
        return None
    return (~truncated).nonzero().squeeze(1).tolist()


def bootstrap(cfg: TruncationOptions, truncated: Tensor, values: Tensor) -> Tensor | None:
    """What is expected to come after the end of each response, [S]; None where nothing does.

    Args:
        cfg: Says what to do.
        truncated: [S] bool.
        values: [S] of the value model, at the last token of each.
    """
    return torch.where(truncated, values, 0.0) if cfg.truncation == "bootstrap" else None
