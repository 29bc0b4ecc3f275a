"""report.html: a run on one page that needs nothing else, neither network nor scripts.

The page is made from the files of the run folder alone, so it can be written again at any time, also for a run that
never finished. What is missing is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from trainer.config_file import RESOLVED
from trainer.files import write_whole
from trainer.plots import chart
from trainer.records import record_of, records
from trainer.report_panels import PANELS, Curves, leftovers, panel_lines
from trainer.report_style import STYLE
from trainer.report_tables import is_number, tables, words
from trainer.run_folder import ALARMS, METRICS, REPORT, SAMPLES, SUMMARY, is_ours

MAX_SAMPLES = 8
HEAD = "<body><main><header><h1>"  # The body of a page of ours begins so.
LARGEST, MOST_STEPS = 1e100, 1e12  # Drawings subtract such numbers and tell such steps apart.


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
    resolved = (folder / RESOLVED).read_text(encoding="utf-8", errors="replace") if (folder / RESOLVED).exists() else ""
    stages = list(dict.fromkeys(stage for stage, _ in curves))
    parts = [
        _header(folder, stages, lost, finished=bool(summary)),
        _verdicts([*_mappings(summary.pop("verdicts", [])), *map(_alarm, alarms)]),
        _section("Results", tables(summary)),
        _section("Training", _grid(_panels(curves, stages)), "Hover over a curve for its values."),
        _section("Samples", _samples(samples)),
        _folded("Every other metric", _grid(_rest(curves, stages))),
        _folded("Configuration", f"<pre>{escape(resolved)}</pre>" if resolved else ""),
    ]
    page = folder / REPORT
    if page.exists() and not is_ours(folder) and HEAD not in page.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"report: {page} is there already, and is no report of ours: move it away first")
    written = _page(folder.resolve().name, "".join(parts))
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


def _panels(curves: Curves, stages: Sequence[str]) -> Iterable[str]:
    for panel in PANELS:
        for lines in panel_lines(panel, curves, stages):
            yield chart(panel.title, lines, panel.about, panel.guide)


def _rest(curves: Curves, stages: Sequence[str]) -> Iterable[str]:
    return (chart(name, [line]) for name, line in leftovers(curves, stages))


def _header(folder: Path, stages: Sequence[str], lost: Sequence[str], *, finished: bool) -> str:
    path = " → ".join(f'<span class="c{i % 6}">{escape(stage)}</span>' for i, stage in enumerate(stages))
    state = "" if finished else "<p class=state>This run has no summary yet: it is under way or was interrupted.</p>"
    state += "".join(f"<p class=state>{escape(line)}</p>" for line in lost)
    return f"<header><h1>{escape(folder.resolve().name)}</h1><p class=legend>{path}</p>{state}</header>"


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    boxes = (
        f'<div class="verdict {"ok" if v.get("ok") else "alarm"}"><i>{"✓" if v.get("ok") else "!"}</i>'
        f"<div><b>{escape(str(v.get('title', '')))}</b><p>{escape(str(v.get('text', '')))}</p></div></div>"
        for v in verdicts
    )
    return f"<div class=verdicts>{''.join(boxes)}</div>"


def _alarm(alarm: Mapping[str, Any]) -> dict[str, Any]:
    title = f"Alarm in {alarm.get('stage')}, update {alarm.get('step')}: {words(str(alarm.get('name')))}"
    message = str(alarm.get("message", ""))
    return {"title": title, "text": f"Since update {alarm.get('since')}, {message}", "ok": False}


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        groups[str(sample.get("title", "samples"))].append(sample)
    parts = []
    for title, group in groups.items():
        more = f"<small> {len(group) - MAX_SAMPLES} more in {SAMPLES}</small>" if len(group) > MAX_SAMPLES else ""
        parts.append(f"<h3>{escape(title)}{more}</h3>" + "".join(map(_sample, group[:MAX_SAMPLES])))
    return "".join(parts)


def _sample(sample: Mapping[str, Any]) -> str:
    """The prompt across, the texts side by side, each number under the text whose name it shares."""
    texts = {k: v for k, v in sample.items() if isinstance(v, str) and k not in ("title", "prompt")}
    numbers = {k: v for k, v in sample.items() if is_number(v) or isinstance(v, bool)}
    columns = []
    for name, text in texts.items():
        own = {k: numbers.pop(k) for k in list(numbers) if name in k.split("_")}
        chips = _chips({" ".join(p for p in k.split("_") if p != name): v for k, v in own.items()})
        columns.append(f"<div><h4>{escape(words(name))}</h4><pre>{escape(text)}</pre>{chips}</div>")
    prompt = f"<pre class=prompt>{escape(str(sample['prompt']))}</pre>" if "prompt" in sample else ""
    return f"<article>{prompt}<div class=columns>{''.join(columns)}</div>{_chips(numbers)}</article>"


def _chips(numbers: Mapping[str, Any]) -> str:
    chips = (f"<span class=chip>{escape(words(k))} <b>{_short(v)}</b></span>" for k, v in numbers.items())
    return "".join(chips)


def _short(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.3g}"


def _grid(figures: Iterable[str]) -> str:
    inner = "".join(figures)
    return f"<div class=grid>{inner}</div>" if inner else ""


def _section(title: str, body: str, hint: str = "") -> str:
    return f"<section><h2>{title}<small>{hint}</small></h2>{body}</section>" if body else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body><main>{body}</main></body></html>\n"
    )
