"""summary.json as tables: a row per measure, a column per model, an interval drawn beside every number that has one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from trainer.report.render import render

GLYPH_WIDTH, GLYPH_HEIGHT = 90, 12
VALUES, HALVES = ("value", "mean", "estimate"), ("half", "half_width", "ci")


class Interval(NamedTuple):
    """A number with its confidence interval."""

    value: float
    low: float
    high: float


Cell = Interval | float | str
Section = dict[str, Cell]


class Glyph(NamedTuple):
    """An interval as it is shown: its ends as texts, and where they and the value lie in the drawing, in pixels."""

    low: str
    high: str
    left: str
    middle: str
    right: str


class Shown(NamedTuple):
    """A cell as it is shown; one that is missing is an empty text."""

    text: str
    is_number: bool = False
    glyph: Glyph | None = None


class Table(NamedTuple):
    """A table as the template takes it; a row has a name."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Shown]]]


def tables(summary: Mapping[str, Any]) -> str:
    """All tables of a summary, as `trainer.report.page.write` describes them, in HTML; nothing if there are none."""
    single: Section = {}
    groups: list[tuple[str, dict[str, Section]]] = []
    for name, value in summary.items():
        if not isinstance(value, Mapping) or _interval(value) is not None:
            single |= _section({name: value})
        elif value and all(isinstance(v, Mapping) and _interval(v) is None for v in value.values()):
            groups.append((words(name).capitalize(), {column: _section(v) for column, v in value.items()}))
        else:
            _join(groups, name, _section(value))
    single = {k: v for k, v in _section(summary).items() if k in single}
    if single:
        groups.append(("Run", {"": single}))
    if not groups:
        return ""
    shown = [_table(title, columns) for title, columns in groups]
    return render("tables.html.jinja", tables=shown, width=GLYPH_WIDTH, height=GLYPH_HEIGHT)


def words(name: str) -> str:
    """A name as people write it.

    >>> words("win_rate")
    'win rate'
    """
    return name.replace("_", " ")


def _join(groups: list[tuple[str, dict[str, Section]]], name: str, section: Section) -> None:
    """Adds a section as a column to the first table that has one of its rows, or as a table of its own."""
    for title, columns in groups:
        if not title and any(row in other for other in columns.values() for row in section):
            columns[name] = section
            return
    groups.append(("", {name: section}))


def _section(values: Mapping[str, Any]) -> Section:
    """Cells by row name; `x_low` and `x_high` beside `x` become the interval of `x`."""
    section: Section = {}
    for name, value in values.items():
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        if is_number(value) and is_number(low) and is_number(high):
            section[name] = Interval(value, low, high)
        elif not any(name.endswith(end) and name.removesuffix(end) in values for end in ("_low", "_high")):
            section[name] = _cell(value)
    return section


def _cell(value: Any) -> Cell:
    if isinstance(value, Mapping) and (interval := _interval(value)) is not None:
        return interval
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return value if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)


def _interval(value: Mapping[str, Any]) -> Interval | None:
    numbers = {k: v for k, v in value.items() if is_number(v)}
    middle = next((numbers[k] for k in VALUES if k in numbers), None)
    if middle is None:
        return None
    if "low" in numbers and "high" in numbers:
        return Interval(middle, numbers["low"], numbers["high"])
    half = next((numbers[k] for k in HALVES if k in numbers), None)
    return None if half is None else Interval(middle, middle - half, middle + half)


def is_number(value: Any) -> TypeGuard[float]:
    """A number to draw or print; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(title: str, columns: Mapping[str, Section]) -> Table:
    names = list(dict.fromkeys(name for section in columns.values() for name in section))
    rows = [(words(name), _cells([section.get(name) for section in columns.values()])) for name in names]
    return Table(title, list(map(words, columns)), rows)


def _cells(cells: Sequence[Cell | None]) -> list[Shown]:
    """One row; its intervals are drawn on one scale, so that overlap can be seen."""
    intervals = [c for c in cells if isinstance(c, Interval)]
    low = min((c.low for c in intervals), default=0.0)
    high = max((c.high for c in intervals), default=1.0)
    # A lone share is drawn on [0, 1]: filling the whole width with its own interval would say nothing.
    if len(intervals) == 1:
        low, high = min(low, 0.0), max(high, 1.0)
    return [_shown(cell, low, high) for cell in cells]


def _shown(cell: Cell | None, low: float, high: float) -> Shown:
    if cell is None or isinstance(cell, str):
        return Shown(cell or "")
    if not isinstance(cell, Interval):
        return Shown(number(cell), True)
    scale = (GLYPH_WIDTH - 8) / ((high - low) or 1.0)
    places = (f"{4 + (v - low) * scale:.1f}" for v in (cell.low, cell.value, cell.high))
    return Shown(number(cell.value), True, Glyph(number(cell.low), number(cell.high), *places))


def number(value: float) -> str:
    """Whole numbers in full, others in three or so digits.

    >>> number(1996), number(0.8573), number(91.234), number(3e-7)
    ('1996', '0.857', '91.2', '3e-07')
    """
    if isinstance(value, int) or value == 0:
        return str(int(value))
    size = abs(value)
    return f"{value:.3f}" if 0.001 <= size < 10 else f"{value:.1f}" if 10 <= size < 1e5 else f"{value:.3g}"
