"""report.html: a run on one page that needs nothing else, neither network nor scripts.

The page is made from the files of the run folder alone, so it can be written again at any time, also for a run that
never finished. What is missing is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from trainer.base.config import RESOLVED
from trainer.base.files import write_whole
from trainer.report.panels import PANELS, Curves, leftovers, panel_lines
from trainer.report.plots import COLORS, Line, chart
from trainer.report.render import render
from trainer.report.tables import is_number, tables, words
from trainer.run.folder import ALARMS, METRICS, REPORT, SAMPLES, SUMMARY, is_ours
from trainer.run.records import record_of, records

MAX_SAMPLES = 8
HEAD = "<body><main><header><h1>"  # The body of a page of ours begins so.
LARGEST, MOST_STEPS = 1e100, 1e12  # Drawings subtract such numbers and tell such steps apart.
Chips = list[tuple[str, str]]  # names and numbers, as they are shown


class Figure(NamedTuple):
    """A plot with its legend and a line of help."""

    title: str
    lines: Sequence[Line]
    about: str
    svg: str


class Sample(NamedTuple):
    """What was said once: texts with their names, each with the numbers that are about it, and all other numbers."""

    prompt: str | None
    texts: list[tuple[str, str, Chips]]
    chips: Chips


def write(out_dir: str | Path) -> Path:
    """Writes the report of a run.

    `summary.json` may hold, beside anything else:

    * `"verdicts"`: a list of `{"title", "text", "ok"}`; boxes at the top.
    * numbers and texts at the top level: the table "Run".
    * sections, `{"sft": {"win_rate": ...}, "ppo": {...}}`: tables with a column per section; sections that share a
      row name share a table. A section of sections is a table of its own.

    A number has a confidence interval as `{"value", "low", "high"}`, as `{"value", "half"}`, or with `name_low` and
    `name_high` beside `name`; the last form works in metrics.jsonl too.

    Args:
        out_dir: A run folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder holds no run, or a report.html of others.
    """
    folder = Path(out_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist or is not a folder")
    if not any((folder / name).exists() for name in (METRICS, SUMMARY, SAMPLES)):
        raise ValueError(f"{folder} holds no run: there is no {METRICS}, {SUMMARY} or {SAMPLES} in it")
    lost: list[str] = []
    summary = _summary(folder / SUMMARY)
    curves = _curves(records(folder / METRICS, lost.append))
    samples, alarms = (records(folder / name, lost.append) for name in (SAMPLES, ALARMS))
    finished = bool(summary)
    verdicts = [*map(_verdict, _mappings(summary.pop("verdicts", []))), *map(_alarm, alarms)]
    resolved = (folder / RESOLVED).read_text(encoding="utf-8", errors="replace") if (folder / RESOLVED).exists() else ""
    stages = list(dict.fromkeys(stage for stage, _ in curves))
    page = folder / REPORT
    if page.exists() and not is_ours(folder) and HEAD not in page.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"report: {page} is there already, and is no report of ours: move it away first")
    written = render(
        "page.html.jinja",
        name=folder.resolve().name,
        stages=stages,
        colors=COLORS,
        finished=finished,
        lost=lost,
        verdicts=verdicts,
        tables=tables(summary),
        figures=list(_panels(curves, stages)),
        samples=_samples(samples),
        samples_file=SAMPLES,
        others=[_figure(name, [line]) for name, line in leftovers(curves, stages)],
        resolved=resolved,
    )
    return write_whole(page, written.encode(errors="backslashreplace"))


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return record_of(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no summary: {error}") from None


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """Those of a list; somebody's summary may hold anything."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Metrics as `{(stage, metric): [(step, value), ...]}`, without what is no number, or too large for a drawing."""
    curves: Curves = defaultdict(list)
    for record in lines:
        stage, step = str(record.get("stage", "run")), record.get("step")
        for name, value in record.items():
            if name not in ("stage", "step") and _drawn(step, MOST_STEPS) and _drawn(value, LARGEST):
                curves[stage, name].append((step, value))
    return dict(curves)


def _drawn(value: Any, largest: float) -> TypeGuard[float]:
    return is_number(value) and abs(value) <= largest


def _panels(curves: Curves, stages: Sequence[str]) -> Iterable[Figure]:
    for panel in PANELS:
        for lines in panel_lines(panel, curves, stages):
            yield _figure(panel.title, lines, panel.about, panel.guide)


def _figure(title: str, lines: Sequence[Line], about: str = "", guide: float | None = None) -> Figure:
    return Figure(title, lines, about, chart(title, lines, guide))


def _verdict(verdict: Mapping[str, Any]) -> tuple[str, str, bool]:
    return str(verdict.get("title", "")), str(verdict.get("text", "")), bool(verdict.get("ok"))


def _alarm(alarm: Mapping[str, Any]) -> tuple[str, str, bool]:
    title = f"Alarm in {alarm.get('stage')}, update {alarm.get('step')}: {words(str(alarm.get('name')))}"
    return title, f"Since update {alarm.get('since')}, {alarm.get('message', '')}", False


def _samples(samples: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Sample], int]]:
    """For each title the first few, and how many more there are."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        groups[str(sample.get("title", "samples"))].append(sample)
    return [
        (title, list(map(_sample, group[:MAX_SAMPLES])), max(0, len(group) - MAX_SAMPLES))
        for title, group in groups.items()
    ]


def _sample(sample: Mapping[str, Any]) -> Sample:
    """Each number is put to the text whose name it shares, and otherwise to the whole."""
    numbers = {k: v for k, v in sample.items() if is_number(v) or isinstance(v, bool)}
    texts = []
    for name, text in sample.items():
        if isinstance(text, str) and name not in ("title", "prompt"):
            own = {k: numbers.pop(k) for k in list(numbers) if name in k.split("_")}
            chips = _chips({" ".join(p for p in k.split("_") if p != name): v for k, v in own.items()})
            texts.append((words(name), text, chips))
    return Sample(str(sample["prompt"]) if "prompt" in sample else None, texts, _chips(numbers))


def _chips(numbers: Mapping[str, Any]) -> Chips:
    return [(words(name), _short(value)) for name, value in numbers.items()]


def _short(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.3g}"
