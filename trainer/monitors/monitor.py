"""Alarms for a run that is left alone: the reward is being gamed, the policy drifts, swells, or falls silent.

Over-optimisation of a reward model: Gao et al. 2022, https://arxiv.org/abs/2210.10760. The thresholds were calibrated
on the demo, see docs/monitors.md, where their false alarms on healthy runs are counted too. A monitor detects; it
does not prevent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.monitors.history import History, Thresholds
from trainer.monitors.measures import FROM_METRICS, LOGGED, Samples, Signals, of_metrics, of_samples
from trainer.monitors.rules import RULES

__all__ = ["Alarm", "Monitor", "Samples", "Thresholds"]

SPAN = 3  # windows that are remembered


@dataclass(frozen=True)
class Alarm:
    """Something that deserves a look."""

    name: str
    """Of the rule: proxy_gold, win_rate, kl, update, no_difference, length, collapse, truncation, tax, self_praise or
    sycophancy."""
    step: int
    """The update at which it was raised."""
    since: int
    """The update since which it could be seen."""
    message: str
    """What was seen, and what to try."""

    def __str__(self) -> str:
        return f"{self.name}, since update {self.since}: {self.message}"


@dataclass
class Run:
    """Updates in a row at which one rule was broken."""

    first: int
    updates: int = 0
    raised: bool = False


class Monitor:
    """Watches one run.

    It holds plain numbers and no models, so that it costs nothing to keep in a checkpoint.

    Args:
        thresholds: When to raise an alarm.
        patterns: Regular expressions of self-praise, searched for in every response.

    Example:
        >>> monitor = Monitor()
        >>> for step in range(1, 9):
        ...     alarms = monitor.update(step, {"objective/kl": 3.0 * step})
        ...     if alarms:
        ...         print(alarms[0].name, alarms[0].since, alarms[0].step)
        kl 6 7
    """

    def __init__(self, thresholds: Thresholds | None = None, patterns: Sequence[str] = ()) -> None:
        self.thresholds = thresholds or Thresholds()
        self.patterns = [re.compile(p) for p in patterns]
        self.seen = History()
        self.alarms: list[Alarm] = []
        self.pending: Signals = {}
        self.broken: dict[str, Run] = {}

    def see(self, samples: Samples) -> None:
        """Takes the signals of a rollout as soon as it is scored; the next ``update`` uses them.

        A checkpoint between rollout and update thus needs no responses.
        """
        self.pending = of_samples(samples, self.patterns)

    def update(self, step: int, metrics: Mapping[str, float], samples: Samples | None = None) -> list[Alarm]:
        """Looks at one update.

        Args:
            step: Counted from 1.
            metrics: As the stage logs them.
            samples: The rollout, unless ``see`` has had it.

        Returns:
            The alarms that this update sets off; one that goes on is not repeated.
        """
        if samples is not None:
            self.see(samples)
        signals, self.pending = self.pending | of_metrics(metrics), {}
        return self.observe(step, signals)

    def observe(self, step: int, signals: Mapping[str, float]) -> list[Alarm]:
        """The same for signals that were reduced before, as in a log that is replayed."""
        self.seen.add(step, signals, keep=SPAN * self.thresholds.window)
        raised = []
        for rule in RULES:
            name, found = rule.__name__, rule(self.seen, self.thresholds)
            if found is None:
                self.broken.pop(name, None)
                continue
            run = self.broken.setdefault(name, Run(step))
            run.updates += 1
            if not run.raised and (found.at_once or run.updates >= self.thresholds.patience):
                run.raised = True
                raised.append(Alarm(name, step, found.since or run.first, found.message))
        self.alarms += raised
        return raised

    def metrics(self) -> dict[str, float]:
        """Signals of the last update that no stage logs itself, under the names that ``of_log`` reads back."""
        return {LOGGED + name: value for name, value in self.seen.last.items() if name not in FROM_METRICS}

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers, as JSON values."""
        return {
            "seen": self.seen.state_dict(),
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "pending": dict(self.pending),
            "broken": {name: asdict(run) for name, run in self.broken.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over from ``state_dict``, also after a detour through JSON."""
        self.seen = History.from_state(state["seen"])
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.pending = dict(state["pending"])
        self.broken = {name: Run(**run) for name, run in state["broken"].items()}
