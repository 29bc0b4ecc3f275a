"""Line charts as inline SVG. Colours come from the page's stylesheet, so one drawing suits light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
MAX_POINTS = 240
SMOOTH_ABOVE = 24
HOVER_POINTS = 40
COLORS = 6
INKS = ("#2f6fb3", "#c8741a", "#1f8a63", "#b8405e", "#7a5bb5", "#6b7280")  # of drawings, which have no stylesheet


@dataclass(frozen=True)
class Line:
    """One curve: a stage's metric over its steps, perhaps with a confidence band."""

    name: str
    color: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def chart(title: str, lines: Sequence[Line], guide: float | None = None) -> str:
    """Curves for a page, whose stylesheet has the colours.

    Args:
        title: What the drawing is called where nobody sees it.
        lines: Curves with at least one point each.
        guide: Height of a dashed horizontal line (chance level, say).

    Returns:
        An `<svg>`; what stands in it as text is escaped.
    """
    shown = [_thin(line) for line in lines]
    values = [v for line in shown for v in (*line.y, *(line.low or ()), *(line.high or ()))]
    x_low, x_high = min(line.x[0] for line in shown), max(line.x[-1] for line in shown)
    y_ticks = ticks(*_span([*values, *_maybe(guide)]))
    frame = Frame(x_low, max(x_high, x_low + 1), y_ticks[0], y_ticks[-1])
    body = [_grid(frame, y_ticks, [t for t in ticks(x_low, x_high, 5, whole=True) if x_low <= t <= x_high])]
    if guide is not None:
        y = frame.y(guide)
        body.append(f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    body += [_curve(frame, line) for line in shown]
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<svg {box}>{''.join(body)}</svg>"


def drawing(
    title: str, lines: Sequence[Line], guide: float | None = None, marks: Sequence[tuple[float, float, str]] = ()
) -> str:
    """The same as a file of its own, for documents, on a white ground and without what to hover over.

    Args:
        title: Above the curves.
        lines: Curves; those of one colour are arms of one kind, and the first of each is named.
        guide: Height of a dashed horizontal line.
        marks: (x, y, what happened there), as dots.
    """
    values = [v for line in lines for v in line.y]
    x_low, x_high = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    y_ticks = ticks(*_span([*values, *_maybe(guide)]))
    frame = Frame(x_low, max(x_high, x_low + 1), y_ticks[0], y_ticks[-1])
    body = [_grid(frame, y_ticks, [t for t in ticks(x_low, x_high, 5, whole=True) if x_low <= t <= x_high])]
    if guide is not None:
        y = frame.y(guide)
        body.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#646b76" stroke-dasharray="4 4"/>')
    for line in lines:
        points = _points([(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)])
        body.append(f'<polyline points="{points}" stroke="{INKS[line.color % len(INKS)]}"/>')
    body += [
        f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="3"><title>{escape(s)}</title></circle>' for x, y, s in marks
    ]
    names: dict[int, str] = {}
    for line in lines:
        names.setdefault(line.color, line.name.split()[0])
    legend = "".join(f'<tspan fill="{INKS[c % len(INKS)]}" dx="8">{escape(n)}</tspan>' for c, n in names.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -20 {WIDTH} {HEIGHT + 20}" width="{2 * WIDTH}" '
        f'font-family="sans-serif" font-size="9" fill="#646b76"><rect y="-20" width="{WIDTH}" height="{HEIGHT + 20}" '
        f'fill="#fff"/><text x="{LEFT}" y="-6" font-size="12" fill="#1d2127">{escape(title)}{legend}</text>'
        f'<g fill="none" stroke-width="1.2"><style>.grid{{stroke:#e3e4e0}}g text{{fill:#646b76}}circle{{fill:#1d2127}}'
        f"</style>{''.join(body)}</g></svg>\n"
    )


@dataclass(frozen=True)
class Frame:
    """Data coordinates to drawing coordinates, rounded to a tenth to keep the page small."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Distance from the left edge."""
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Distance from the upper edge."""
        return round(HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float, about: int = 4, *, whole: bool = False) -> list[float]:
    """Round numbers from at most `low` to at least `high`, two or more.

    >>> ticks(0.03, 0.94)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def _grid(frame: Frame, y_ticks: Sequence[float], x_ticks: Sequence[float]) -> str:
    parts = [f'<text x="4" y="{HEIGHT - 6}">step</text>']
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{frame.x(tick)}" y="{HEIGHT - 6}" text-anchor="middle">{tick:.6g}</text>')
    return "".join(parts)


def _curve(frame: Frame, line: Line) -> str:
    """Band, raw curve (faint where a smooth one lies over it), and a dot to hover over every so often."""
    points = list(zip(line.x, line.y, strict=True))
    parts = []
    if line.low and line.high:
        there = [(frame.x(x), frame.y(v)) for x, v in zip(line.x, line.high, strict=True)]
        back = [(frame.x(x), frame.y(v)) for x, v in zip(line.x, line.low, strict=True)][::-1]
        parts.append(f'<polygon class="band" points="{_points(there + back)}"/>')
    raw = _points([(frame.x(x), frame.y(y)) for x, y in points])
    if len(points) > SMOOTH_ABOVE:
        smooth = zip(line.x, _smooth(line.y), strict=True)
        parts.append(f'<polyline class="raw" points="{raw}"/>')
        parts.append(f'<polyline points="{_points([(frame.x(x), frame.y(y)) for x, y in smooth])}"/>')
    else:
        parts.append(f'<polyline points="{raw}"/>')
    dots = "dots" if len(points) <= SMOOTH_ABOVE // 2 else "hidden"
    for x, y in points[:: math.ceil(len(points) / HOVER_POINTS)]:
        label = f"<title>{escape(line.name)}, step {x:g}: {y:.4g}</title>"
        parts.append(f'<circle class="{dots}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3">{label}</circle>')
    return f'<g class="c{line.color % COLORS}">{"".join(parts)}</g>'


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in pairs)


def _smooth(y: Sequence[float]) -> list[float]:
    """Centred moving average over a twentieth of the curve; the window shrinks at the ends instead of bending them."""
    reach = max(2, len(y) // 40)
    sums = [0.0]
    for value in y:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(y)):
        r = min(reach, i, len(y) - 1 - i)
        out.append((sums[i + r + 1] - sums[i - r]) / (2 * r + 1))
    return out


def _thin(line: Line) -> Line:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = math.ceil(len(line.x) / MAX_POINTS)
    if size == 1:
        return line
    means = [_means(series, size) for series in (line.x, line.y, line.low, line.high)]
    return Line(line.name, line.color, means[0] or [], means[1] or [], means[2], means[3])


def _means(series: Sequence[float] | None, size: int) -> list[float] | None:
    if series is None:
        return None
    return [sum(part) / len(part) for part in (series[i : i + size] for i in range(0, len(series), size))]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, down to zero where that costs little: a small wobble should look small."""
    low, high = min(values), max(values)
    return (0.0, high) if 0 < low < high / 2 else (low, high)


def _maybe(value: float | None) -> list[float]:
    return [] if value is None else [value]
