"""Numbers with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def proportion(successes: float, total: int) -> Estimate:
    """A share with Wilson's interval, which stays inside [0, 1] and is honest near its ends.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953. Halves may count as successes (ties).

    Example:
        >>> print(proportion(9, 10))
        0.900 [0.596, 0.982]
    """
    if total == 0:
        return Estimate(float("nan"), 0.0, 1.0)
    p, n = successes / total, float(total)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    # At 0 and 1 the bound is the share itself, but for rounding.
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """A mean with a percentile bootstrap interval (Efron 1979)."""
    x = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(x[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(x.mean()), low, high)


def ratio_change(before: Sequence[float], after: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Relative change of a sum over items that were measured twice, with a paired percentile bootstrap interval.

    Args:
        before: Per item; the sum is not zero.
        after: The same items again.
        resamples: Draws.
        seed: Of the draws.

    Example:
        >>> print(ratio_change([1.0, 2.0, 3.0], [1.1, 2.2, 3.3]))
        0.100 [0.100, 0.100]
    """
    x, y = torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
    draws = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    changes = y[draws].sum(1) / x[draws].sum(1) - 1
    low, high = torch.quantile(changes, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(y.sum() / x.sum() - 1), low, high)
