"""The coefficient that holds a policy near its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class KLController:
    """Fixed without a target; otherwise proportional control of the logarithm, as in Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2.

    Everything is in nats per sequence: the sum over a response, not the mean over its tokens.

    Example:
        >>> control = KLController(coef=0.1, target_per_seq=6.0, horizon=1000)
        >>> control.update(kl_per_seq=60.0, sequences=100)  # far above the target: at most 20 % of 100 / 1000 up
        >>> round(control.coef, 6)
        0.102
    """

    coef: float
    target_per_seq: float | None = None
    horizon: float = 10_000.0
    """Sequences over which a full error would change the coefficient by its own size."""

    def update(self, kl_per_seq: float, sequences: int) -> None:
        """Moves the coefficient after a batch whose mean KL was ``kl_per_seq``."""
        if self.target_per_seq is None or not math.isfinite(kl_per_seq):  # one NaN would stay for good
            return
        error = min(max(kl_per_seq / self.target_per_seq - 1, -0.2), 0.2)
        self.coef *= 1 + error * sequences / self.horizon
