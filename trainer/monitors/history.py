"""When an alarm is raised, what a monitor remembers of a run, and what a rule finds in that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainer.base.config import check_names
from trainer.monitors.measures import Signals, mean


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Calibrated on the demo (docs/monitors.md). Signals are averaged over a window before they are compared."""

    window: int = 5
    """Updates that a signal is averaged over."""
    patience: int = 2
    """Updates in a row that a rule has to be broken."""
    gold_errors: float = 4.0
    """Standard errors that the gold score may lie below its best while the reward still rises."""
    gold_drop: float = 0.2
    """And at least this much, in standard deviations of the first gold scores."""
    proxy_errors: float = 2.0
    """Standard errors of the reward that count as a rise."""
    kl_per_seq: float = 10.0
    """Nats per response between policy and reference."""
    kl_growth: float = 4.0
    """Nats per response that the KL may grow in twice the window."""
    length_change: float = 0.3
    """Relative change of the mean length since the start."""
    length_corr: float = 0.5
    """Correlation of reward and length."""
    entropy: float = 0.15
    """Share of the first entropy that has to remain."""
    distinct: float = 0.5
    """Share of the first share of different responses that has to remain."""
    forms: float = 0.05
    """Share of the first effective number of answer forms that has to remain."""
    truncated: float = 0.2
    """Share of responses cut off by the limit."""
    ignored: float = 0.5
    """Share of responses whose reward is replaced because they were cut off, in one rollout."""
    step_kl: float = 0.1
    """Nats per token between the policy that sampled and that of a rollout's optimizer steps, or behind the last."""
    step_ratio: float = 0.25
    """How far the mean of their ratios, which is one in expectation, may lie from one."""
    step_loss: float = 100.0
    """Size of the policy's loss."""
    lm_loss: float = 0.05
    """Relative rise of the held-out language-model loss."""
    self_praise: float = 0.05
    """Rise of the share of responses that praise themselves."""
    sycophancy: float = 0.1
    """Rise of the share of right answers that are given up when the user disagrees."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value}, want a positive number")
        for name in ("window", "patience"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want a whole number of updates")


def thresholds_from(items: Sequence[str]) -> Thresholds:
    """Thresholds as the command line takes them, NAME=NUMBER; the others stay as they are.

    Raises:
        ValueError: There is no such threshold, or it cannot have this value.

    Example:
        >>> thresholds_from(["kl_per_seq=30", "window=8"]).kl_per_seq
        30.0
    """
    given = {name: value for name, _, value in (item.partition("=") for item in items)}
    whole = {f.name: f.type == "int" for f in fields(Thresholds)}
    check_names(given, whole, "thresholds")
    try:
        numbers: dict[str, Any] = {name: int(x) if whole[name] else float(x) for name, x in given.items()}
        return Thresholds(**numbers)
    except ValueError as error:
        raise ValueError(f"thresholds: got {' '.join(items)}, want NAME=NUMBER: {error}") from None


@dataclass
class History:
    """What a monitor remembers: the first value of each signal, the recent ones, and two high-water marks."""

    first: Signals = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    last: Signals = field(default_factory=dict)
    """Of the last update alone: a signal that it did not bring is not in here."""
    marks: dict[str, dict[str, float]] = field(default_factory=dict)
    updates: int = 0
    step: int = 0

    def add(self, step: int, signals: Mapping[str, float], keep: int) -> None:
        """One update's signals."""
        self.step, self.updates, self.last = step, self.updates + 1, dict(signals)
        for name, value in signals.items():
            self.first.setdefault(name, value)
            self.recent.setdefault(name, []).append(value)
            del self.recent[name][:-keep]

    def smooth(self, name: str, window: int, ago: int = 0) -> float | None:
        """Mean over a window that ended ``ago`` updates before the last; None if there is nothing in it."""
        values = self.recent.get(name, [])
        stop = len(values) - ago
        part = values[max(stop - window, 0) : max(stop, 0)]
        return mean(part) if part else None

    def error(self, name: str, window: int) -> float:
        """Standard error of ``smooth``, from those of its members."""
        part = self.recent.get(f"{name}_se", [0.0])[-window:]
        return math.sqrt(sum(e * e for e in part)) / len(part)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """The inverse; nothing is shared with ``state``."""
        return cls(
            dict(state["first"]), {k: list(v) for k, v in state["recent"].items()}, dict(state["last"]),
            {k: dict(v) for k, v in state["marks"].items()}, state["updates"], state["step"],
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A broken rule."""

    message: str
    since: int | None = None
    """If it is another update than the one at which the rule was broken first."""
    at_once: bool = False
    """Whether to raise it without patience."""
