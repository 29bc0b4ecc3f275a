"""How the learning rate rises and falls."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, total: int, kind: str) -> float:
    """The learning rate of one optimizer step: a linear rise to the peak, then constant or down to a tenth of it.

    Args:
        step: Steps taken before this one.
        peak: The largest learning rate.
        warmup: Steps of the rise.
        total: Steps of the whole run, those of the rise included.
        kind: "constant", "linear" or "cosine".

    Example:
        >>> [round(learning_rate(t, peak=1.0, warmup=2, total=4, kind="linear"), 2) for t in range(5)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    warm = min(1.0, (step + 1) / max(warmup, 1))
    done = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
    fall = {"constant": 1.0, "linear": 1 - 0.9 * done, "cosine": 0.55 + 0.45 * math.cos(math.pi * done)}
    return peak * warm * fall[kind]
