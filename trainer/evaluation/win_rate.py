"""How often one policy beats another."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.base.statistics import Estimate, proportion


def win_rate(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Share of prompts on which the first scores higher; ties count half."""
    wins = sum(0.5 if a == b else float(a > b) for a, b in zip(mine, theirs, strict=True))
    return proportion(wins, len(mine))
