"""What a monitor looks at: plain numbers out of one rollout's responses and out of the metrics of an update."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Signals = dict[str, float]
MOST_WORDS = 20_000  # distinct-n falls with the amount of text, so it is always taken over at most this much

LOGGED = "monitor/"  # begins the names of signals in metrics.jsonl
FROM_METRICS = {
    "kl": "objective/kl",
    "step_kl": "policy/approxkl_avg",
    "step_after": "policy/kl_after",
    "step_ratio": "val/ratio",
    "step_loss": "loss/policy_avg",
    "no_difference": "policy/no_difference",
    "entropy": "policy/entropy_avg",
    "truncated": "response/truncated",
    "ignored": "response/ignored",
    "win_rate": "eval/win_rate",
    "win_rate_low": "eval/win_rate_low",
    "win_rate_high": "eval/win_rate_high",
    "lm_loss": "eval/lm_loss",
    "sycophancy": "eval/sycophancy",
}


@dataclass(frozen=True)
class Samples:
    """The responses of one rollout and what they scored."""

    prompts: Sequence[str]
    responses: Sequence[str]
    lengths: Sequence[int]
    """Tokens per response, its end included."""
    scores: Sequence[float]
    """By the reward that is trained on."""
    gold: Sequence[float] | None = None
    """By something that nothing is trained on: a second reward model, a judge, a verifier."""


def of_samples(samples: Samples, patterns: Sequence[re.Pattern[str]] = ()) -> Signals:
    """Signals of one rollout.

    Args:
        samples: At least one response.
        patterns: Self-praise, one expression per habit.

    Returns:
        ``proxy``, ``gold`` (means), their standard errors ``_se``, ``gold_std``; ``length``; ``length_corr`` and
        ``length_slope`` (of the score on the length, per token); ``distinct``, the share of different responses;
        ``forms``, their effective number after words of the prompt were blanked out; ``distinct_2``, the share of
        different word pairs; ``self_praise``, the share of responses that match, and ``self_praise_gain``, how much
        more they score. Signals without meaning are missing.

    Raises:
        ValueError: The lists differ in length, or are empty.
    """
    count = len(samples.responses)
    columns = (samples.prompts, samples.lengths, samples.scores, samples.gold)
    sizes = [len(column) for column in columns if column is not None]
    if not count or any(size != count for size in sizes):
        raise ValueError(f"samples: got {count} responses and columns of {sizes}, want one of each per response")
    scores, lengths = samples.scores, [float(n) for n in samples.lengths]
    signals: Signals = {"proxy": mean(scores), "proxy_se": error(scores), "length": mean(lengths)}
    if samples.gold is not None:
        gold_std = error(samples.gold) * math.sqrt(count)
        signals |= {"gold": mean(samples.gold), "gold_se": error(samples.gold), "gold_std": gold_std}
    slope, correlation = regression(lengths, scores)
    signals |= {"length_slope": slope, "length_corr": correlation}
    signals |= {"distinct": len(set(samples.responses)) / count, "distinct_2": distinct_n(samples.responses, 2)}
    signals["forms"] = effective_number(form(p, r) for p, r in zip(samples.prompts, samples.responses, strict=True))
    if patterns:
        signals |= praise(samples.responses, scores, patterns)
    return {name: value for name, value in signals.items() if math.isfinite(value)}


def of_metrics(metrics: Mapping[str, float]) -> Signals:
    """Signals among the metrics of an update, by their short names; what is missing or not finite is left out.

    >>> of_metrics({"objective/kl": 1.5, "lr": 0.1})
    {'kl': 1.5}
    """
    found = {name: metrics.get(metric) for name, metric in FROM_METRICS.items()}
    return {name: float(x) for name, x in found.items() if x is not None and math.isfinite(x)}


def of_log(record: Mapping[str, float]) -> Signals:
    """All signals of an update from its line in metrics.jsonl, to look at a finished run with other thresholds.

    >>> of_log({"objective/kl": 1.5, "monitor/gold": 0.2, "lr": 0.1})
    {'gold': 0.2, 'kl': 1.5}
    """
    own = {name.removeprefix(LOGGED): float(x) for name, x in record.items() if name.startswith(LOGGED)}
    return {name: x for name, x in own.items() if name != "alarms"} | of_metrics(record)


def form(prompt: str, response: str) -> str:
    """A response with every word that its prompt holds blanked out: what remains when the subject changes.

    >>> form("sort : fig date", "sure : date fig . enjoy")
    'sure _ _ _ . enjoy'
    """
    given = set(prompt.split())
    return " ".join("_" if word in given else word for word in response.split())


def effective_number(items: object) -> float:
    """Exponential of the entropy of the items' frequencies: how many equally frequent ones would be as diverse.

    >>> round(effective_number("aabb"), 6)
    2.0
    """
    counts = Counter(items)  # type: ignore[call-overload]
    total = counts.total()
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of n-grams of words that differ (Li et al. 2016, https://arxiv.org/abs/1510.03055); nan without any."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if grams.total() >= MOST_WORDS:
            break
    return len(grams) / grams.total() if grams else math.nan


def regression(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of y on x, and their correlation; both 0 where one of them does not vary."""
    mx, my = mean(x), mean(y)
    xx = sum((a - mx) ** 2 for a in x)
    yy = sum((b - my) ** 2 for b in y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    # Sums of squares of a constant are not exactly zero.
    flat = min(xx / max(mx**2, 1e-12), yy / max(my**2, 1e-12)) < 1e-18
    return (0.0, 0.0) if flat else (xy / xx, xy / math.sqrt(xx * yy))


def praise(responses: Sequence[str], scores: Sequence[float], patterns: Sequence[re.Pattern[str]]) -> Signals:
    """Share of responses that praise themselves, and what they score more than the others."""
    hits = [any(p.search(text) for p in patterns) for text in responses]
    signals = {"self_praise": sum(hits) / len(hits)}
    if any(hits) and not all(hits):
        mine = mean([s for s, hit in zip(scores, hits, strict=True) if hit])
        signals["self_praise_gain"] = mine - mean([s for s, hit in zip(scores, hits, strict=True) if not hit])
    return signals


def mean(values: Sequence[float]) -> float:
    """Mean of at least one number."""
    return math.fsum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single number."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))
