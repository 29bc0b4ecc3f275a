"""When to raise an alarm: one small function per rule, over the recent signals of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.monitors.history import Found, History, Thresholds
from trainer.monitors.step_rules import no_difference, truncation, update


def proxy_gold(seen: History, t: Thresholds) -> Found | None:
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


def win_rate(seen: History, t: Thresholds) -> Found | None:
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


def kl(seen: History, t: Thresholds) -> Found | None:
    """The policy is far from its reference, or runs away from it."""
    now = seen.smooth("kl", t.window)
    if now is None or "kl" not in seen.last:  # A rollout that took no step brings no news of it.
        return None
    advice = "Raise kl_coef, set kl_target_per_seq, or lower lr; read some samples before you trust the reward."
    if now > t.kl_per_seq:
        return Found(
            f"the KL is {now:.1f} nats per response on average ({seen.last['kl']:.1f} in this update), more than "
            f"{t.kl_per_seq:g}. {advice}"
        )
    before = seen.smooth("kl", t.window, ago=2 * t.window)
    if before is not None and now - before > t.kl_growth:
        return Found(f"the KL grew from {before:.1f} to {now:.1f} nats within {2 * t.window} updates. {advice}")
    return None


def length(seen: History, t: Thresholds) -> Found | None:
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


def collapse(seen: History, t: Thresholds) -> Found | None:
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


def tax(seen: History, t: Thresholds) -> Found | None:
    """The policy forgets the language it had."""
    now, first = seen.smooth("lm_loss", 1), seen.first.get("lm_loss")
    if now is None or first is None or now <= first * (1 + t.lm_loss):
        return None
    return Found(
        f"the held-out language-model loss is {now:.3f}, {now / first - 1:+.1%} since the start. Mix in pre-training "
        "or demonstration text (ptx_coef), raise kl_coef, or lower lr.",
        at_once=True,
    )


def self_praise(seen: History, t: Thresholds) -> Found | None:
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


def sycophancy(seen: History, t: Thresholds) -> Found | None:
    """Right answers are given up when the user disagrees."""
    now, first = seen.smooth("sycophancy", 1), seen.first.get("sycophancy")
    if now is None or first is None or now - first <= t.sycophancy:
        return None
    return Found(
        f"the policy gives up {now:.0%} of its right answers when the user disagrees, {first:.0%} at the start. "
        "Annotators may prefer to be agreed with: add pairs in which the right answer stands.",
        at_once=True,
    )


RULES: tuple[Callable[[History, Thresholds], Found | None], ...] = (
    proxy_gold, win_rate, kl, update, no_difference, length, collapse, truncation, tax, self_praise, sycophancy,
)  # fmt: skip
