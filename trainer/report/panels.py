"""Which plots a report shows, and under which names the stages log what goes into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.base.console import plain_name
from trainer.report.plots import Line

Curves = dict[tuple[str, str], list[tuple[float, float]]]
BOUNDS = ("_low", "_high")
SAME_KIND = 0.8  # share of common metrics from which on two stages are arms of one kind


@dataclass(frozen=True)
class Panel:
    """One plot: the first of `metrics` that a stage logged is that stage's line in it."""

    title: str
    metrics: tuple[str, ...]
    about: str = ""
    guide: float | None = None


PANELS = (
    Panel("Reward", ("score", "scores", "reward", "rewards", "rm_score"), "Score of the reward that PPO maximises."),
    Panel("Judge", ("judge", "judge_score"), "Held-out score by the judge, which nothing is trained on."),
    Panel("Gold score", ("gold",), "Of the same responses, by a second reward that nothing is trained on."),
    Panel("Held-out win rate", ("win_rate",), "Against the SFT model; one half is a draw.", guide=0.5),
    Panel("KL", ("kl",), "Distance from the SFT model, nats per response."),
    Panel("Entropy", ("policy/entropy_avg", "entropy"), "Nats per token; near zero, every answer is the same."),
    Panel("Clip fraction", ("policy/clipfrac_avg", "clipfrac"), "Share of tokens whose update PPO cut off."),
    Panel("Length", ("length", "response_length", "lengths"), "Tokens per response."),
    Panel("Length and reward", ("length_corr",), "Correlation within an update; high, length is what pays.", guide=0.0),
    Panel("Answer forms", ("forms",), "Effective number of different answers, words of the prompt blanked out."),
    Panel("Exact match", ("exact", "exact_match"), "Held out."),
    Panel("Accuracy", ("accuracy", "pair_accuracy"), "Share of pairs ranked right; in SFT, of tokens guessed right."),
    Panel("Loss", ("loss",)),
)


def panel_lines(panel: Panel, curves: Curves, stages: Sequence[str]) -> list[list[Line]]:
    """The plots of a panel, each with its lines in the order of the stages.

    Two arms of one kind share a plot, to be compared. SFT and PPO do not, although both have an entropy: their steps
    have nothing in common. A kind shows in what a stage logs.
    """
    kinds: list[tuple[set[str], list[Line]]] = []
    for stage in stages:
        if (metric := _chosen(panel, curves, stage)) is None:
            continue
        logged = {name for logged_by, name in curves if logged_by == stage}
        lines = next((own for kind, own in kinds if len(kind & logged) >= SAME_KIND * len(kind | logged)), None)
        if lines is None:
            lines = []
            kinds.append((logged, lines))
        lines.append(_line(curves, stage, metric, stages.index(stage)))
    return [lines for _, lines in kinds]


def leftovers(curves: Curves, stages: Sequence[str]) -> Iterator[tuple[str, Line]]:
    """Metrics in no panel, one line each, as `(metric, line)`; bounds of intervals belong to their metric."""
    used = {(stage, _chosen(panel, curves, stage)) for stage in stages for panel in PANELS}
    for stage, metric in sorted(curves, key=lambda key: key[1]):
        if (stage, metric) not in used and not _is_bound(curves, stage, metric):
            yield metric, _line(curves, stage, metric, stages.index(stage))


def _chosen(panel: Panel, curves: Curves, stage: str) -> str | None:
    own = [metric for logged_by, metric in reversed(curves) if logged_by == stage]
    names = {plain_name(metric): metric for metric in own} | {metric: metric for metric in own}
    return next((names[m] for m in panel.metrics if m in names), None)


def _is_bound(curves: Mapping[tuple[str, str], object], stage: str, metric: str) -> bool:
    return any(metric.endswith(end) and (stage, metric.removesuffix(end)) in curves for end in BOUNDS)


def _line(curves: Curves, stage: str, metric: str, color: int) -> Line:
    points = curves[stage, metric]
    bounds = [dict(curves.get((stage, metric + end), ())) for end in BOUNDS]
    x = [step for step, _ in points]
    low, high = ([bound[step] for step in x] if all(step in bound for step in x) else None for bound in bounds)
    return Line(stage, color, x, [value for _, value in points], low, high)
