"""When to raise an alarm: one small function per rule, over the recent signals of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainer.config_file import check_names
from trainer.monitor_signals import Signals, mean

ALL_CUT_OFF = 0.95


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
class Seen:
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
    def from_state(cls, state: Mapping[str, Any]) -> Seen:
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


def proxy_gold(seen: Seen, t: Thresholds) -> Found | None:
    """The reward goes on rising while the gold score, which nothing is trained on, falls from its best."""
    if "gold" not in seen.last or seen.updates < t.window:
        return None
    proxy, gold = seen.smooth("proxy", t.window), seen.smooth("gold", t.window)
    if proxy is None or gold is None:
        return None
    now = {"proxy": proxy, "proxy_se": seen.error("proxy", t.window), "gold": gold}
    now |= {"gold_se": seen.error("gold", t.window), "step": float(seen.step)}
    best = seen.marks.setdefault("gold", now)
    if gold >= best["gold"]:
        seen.marks["gold"] = now
        return None
    fall, rise = best["gold"] - gold, proxy - best["proxy"]
    least = max(t.gold_errors * math.hypot(now["gold_se"], best["gold_se"]), t.gold_drop * seen.first["gold_std"])
    if fall <= least or rise <= t.proxy_errors * math.hypot(now["proxy_se"], best["proxy_se"]):
        return None
    since = int(best["step"])
    return Found(
        f"the reward rose from {best['proxy']:.3g} to {proxy:.3g} while the gold score fell from {best['gold']:.3g} to "
        f"{gold:.3g}: the policy games the reward. Go back to the policy of update {since} or earlier, raise kl_coef, "
        "or give the reward model rankings of this policy's responses.",
        since,
    )


def win_rate(seen: Seen, t: Thresholds) -> Found | None:
    """A held-out win rate has fallen beyond both intervals since the best evaluation, and the reward has not."""
    value, low, high = (seen.smooth(f"win_rate{end}", 1) for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return None
    now = {"value": value, "low": low, "high": high, "proxy": seen.smooth("proxy", t.window) or 0.0}
    best = seen.marks.setdefault("win_rate", now | {"step": float(seen.step)})
    if value >= best["value"]:
        if "win_rate" in seen.last:
            seen.marks["win_rate"] = now | {"step": float(seen.step)}
        return None
    if high >= best["low"] or now["proxy"] < best["proxy"]:
        return None
    since = int(best["step"])
    return Found(
        f"the held-out win rate fell from {best['value']:.2f} to {value:.2f} while the reward did not. Go back to the "
        f"policy of update {since}, and raise kl_coef or lower lr.",
        since, at_once=True,
    )  # fmt: skip


def kl(seen: Seen, t: Thresholds) -> Found | None:
    """The policy is far from its reference, or runs away from it."""
    now = seen.smooth("kl", t.window)
    if now is None:
        return None
    advice = "Raise kl_coef, set kl_target_per_seq, or lower lr; read some samples before you trust the reward."
    if now > t.kl_per_seq:
        return Found(f"the KL is {now:.1f} nats per response, more than {t.kl_per_seq:g}. {advice}")
    before = seen.smooth("kl", t.window, ago=2 * t.window)
    if before is not None and now - before > t.kl_growth:
        return Found(f"the KL grew from {before:.1f} to {now:.1f} nats within {2 * t.window} updates. {advice}")
    return None


def length(seen: Seen, t: Thresholds) -> Found | None:
    """Responses grow or shrink, or the reward follows their length."""
    now, first = seen.smooth("length", t.window), seen.first.get("length")
    if now is not None and first and abs(now / first - 1) > t.length_change:
        return Found(
            f"responses have {now:.0f} tokens on average, {first:.0f} at the start. Compare long and short ones by "
            "hand; shape the reward by length if it pays for nothing else."
        )
    follows = seen.smooth("length_corr", t.window)
    if follows is not None and follows > t.length_corr and seen.updates >= t.window:
        return Found(
            f"the reward follows the length (correlation {follows:.2f}). Look at the length bias of the preference "
            "data (rlhf-train inspect), or shape the reward by length."
        )
    return None


def collapse(seen: Seen, t: Thresholds) -> Found | None:
    """The policy says ever the same."""
    for name, share, what in (
        ("entropy", t.entropy, "the entropy per token"),
        ("distinct", t.distinct, "the share of different responses"),
        ("forms", t.forms, "the number of answer forms"),
    ):
        now, first = seen.smooth(name, t.window), seen.first.get(name)
        if now is not None and first and now < share * first:
            return Found(
                f"{what} is {now:.3g}, {now / first:.0%} of the start. Raise entropy_coef or kl_coef, lower lr, or "
                "stop: what is left to learn needs variety."
            )
    return None


def truncation(seen: Seen, t: Thresholds) -> Found | None:
    """Responses are cut off, so that their end is never rewarded."""
    last, now = seen.last.get("truncated"), seen.smooth("truncated", t.window)
    if last is None or now is None:
        return None
    if seen.updates == 1 and last >= ALL_CUT_OFF:
        return Found(
            f"{last:.0%} of the responses were cut off by the limit, so that no end is ever rewarded. Raise "
            "max_new_tokens, or start from a model that ends its responses.",
            at_once=True,
        )
    if now > t.truncated:
        return Found(
            f"{now:.0%} of the responses are cut off by the limit. Raise max_new_tokens, or penalise truncation more."
        )
    return None


def tax(seen: Seen, t: Thresholds) -> Found | None:
    """The policy forgets the language it had."""
    now, first = seen.smooth("lm_loss", 1), seen.first.get("lm_loss")
    if now is None or first is None or now <= first * (1 + t.lm_loss):
        return None
    return Found(
        f"the held-out language-model loss is {now:.3f}, {now / first - 1:+.1%} since the start. Mix in pre-training "
        "or demonstration text (ptx_coef), raise kl_coef, or lower lr.",
        at_once=True,
    )


def self_praise(seen: Seen, t: Thresholds) -> Found | None:
    """Responses tell how good they are, which fools reward models and helps nobody."""
    now, first = seen.smooth("self_praise", t.window), seen.first.get("self_praise")
    if now is None or first is None or now - first <= t.self_praise:
        return None
    gain = seen.smooth("self_praise_gain", t.window)
    pays = "" if gain is None else f" They score {gain:+.2f} against the others."
    return Found(
        f"{now:.0%} of the responses praise themselves, {first:.0%} did at the start.{pays} Rank some of them with "
        "the praise removed, and train the reward model on that."
    )


def sycophancy(seen: Seen, t: Thresholds) -> Found | None:
    """Right answers are given up when the user disagrees."""
    now, first = seen.smooth("sycophancy", 1), seen.first.get("sycophancy")
    if now is None or first is None or now - first <= t.sycophancy:
        return None
    return Found(
        f"the policy gives up {now:.0%} of its right answers when the user disagrees, {first:.0%} at the start. "
        "Annotators may prefer to be agreed with: add pairs in which the right answer stands.",
        at_once=True,
    )


RULES: tuple[Callable[[Seen, Thresholds], Found | None], ...] = (
    proxy_gold, win_rate, kl, length, collapse, truncation, tax, self_praise, sycophancy,
)  # fmt: skip
