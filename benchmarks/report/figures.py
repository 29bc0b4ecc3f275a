"""Figures of measured rows, as SVG of their own on a white ground."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from benchmarks.measure.turns import Row

Series = dict[str, list[tuple[float, float]]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 360, 64, 170, 34, 46
INKS = {
    "ours": "#c2371f", "torch eager": "#2f6fb3", "torch.compile": "#123f73", "torch's linear CE": "#7fa8d6",
    "TRL": "#c8941a", "Liger": "#1f8a63", "verl": "#7a5bb5", "quack": "#0f9aa8", "CCE": "#8a5a2b", "other": "#6b7280",
}  # fmt: skip
STARTS = {
    "torch, materialised": "torch eager", "torch.compile": "torch.compile", "torch linear": "torch's linear CE",
    "TRL": "TRL", "Liger": "Liger", "verl": "verl", "quack": "quack", "CCE": "CCE",
}  # fmt: skip


def who(row: Row) -> str:
    if row["side"] == "ours":
        return "ours"
    return next((short for start, short in STARTS.items() if row["contender"].startswith(start)), "other")


def _told(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}" if x == 0 or abs(x) >= 1e-3 else f"{x:.0e}"


class Axis:
    """From values to pixels, with round ticks."""

    def __init__(self, values: Iterable[float], low: float, high: float, *, log: bool) -> None:
        found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        self.log, self.start, self.end = log, low, high
        least, most = min(found), max(found)
        if log:
            self.low, self.high = math.floor(math.log10(least)), max(math.ceil(math.log10(most)), 1 - 324)
            self.high = max(self.high, self.low + 1)
            self.ticks = [10.0**k for k in range(self.low, self.high + 1)]
        else:
            step = 10 ** math.floor(math.log10(max(most, 1e-9)))
            step = next(s for s in (step / 5, step / 2, step, 2 * step) if most / s <= 8)
            self.low, self.high = 0.0, step * math.ceil(most / step)
            self.ticks = [k * step for k in range(round(self.high / step) + 1)]

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return round(self.start + (self.end - self.start) * (at - self.low) / (self.high - self.low), 1)


def drawing(
    title: str, x_label: str, y_label: str, series: Series, *, x_log: bool = True, y_log: bool = False,
    lines: bool = False, guide: float | None = None, tell: Callable[[float], str] = _told,
) -> str:  # fmt: skip
    """Points, or lines through them, one colour a series; ``guide`` is a dashed height."""
    points = [p for found in series.values() for p in found]
    x = Axis([p[0] for p in points], LEFT, WIDTH - RIGHT, log=x_log)
    y = Axis([p[1] for p in points] + ([] if guide is None else [guide]), HEIGHT - BOTTOM, TOP, log=y_log)
    body = [f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']
    for tick in x.ticks:
        body.append(f'<path d="M{x(tick)} {TOP}V{HEIGHT - BOTTOM}" stroke="#e3e6ea"/>')
        body.append(f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_told(tick)}</text>')
    for tick in y.ticks:
        body.append(f'<path d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tell(tick)}</text>')
    if guide is not None:
        body.append(f'<path d="M{LEFT} {y(guide)}H{WIDTH - RIGHT}" stroke="#646b76" stroke-dasharray="5 4"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    body.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for place, (name, found) in enumerate(sorted(series.items(), key=lambda s: list(INKS).index(s[0]))):
        ink = INKS[name]
        if lines:
            path = "L".join(f"{x(a)} {y(b)}" for a, b in sorted(found))
            body.append(f'<path d="M{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        for a, b in found:
            body.append(f'<circle cx="{x(a)}" cy="{y(b)}" r="4" fill="{ink}" fill-opacity="0.8"/>')
        at = TOP + 10 + 20 * place
        body.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{at}" r="5" fill="{ink}"/>')
        body.append(f'<text x="{WIDTH - RIGHT + 30}" y="{at + 4}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11" fill="#24292f"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _series(rows: Iterable[Row], x: Callable[[Row], float | None], y: Callable[[Row], float | None]) -> Series:
    found: Series = {}
    for row in rows:
        point = x(row), y(row)
        if None not in point:
            found.setdefault(who(row), []).append(point)  # type: ignore[arg-type]
    return found


def _least(rows: Sequence[Row], what: str, *keys: str) -> list[Row]:
    """Of each contestant's entries of one kind, the one with the least of something."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = who(row), *(row.get(k) for k in keys)
        if key not in best or row[what] < best[key][what]:
            best[key] = row
    return list(best.values())


def of(rows: Sequence[Row]) -> dict[str, str]:
    """The figures that these rows suffice for, by name."""
    right = [r for r in rows if r["side"] != "floor" and str(r.get("verdict")).startswith("ok")]
    timed = [r for r in right if "median_s" in r and r["op"] not in ("gae", "logits")]
    drawn: dict[str, str] = {}
    shares = _series(
        [r for r in timed if "nats" not in r],
        lambda r: 1e3 * r["median_s"],
        lambda r: 100 / r["to_floor"] if r.get("to_floor") else None,
    )
    if shares:
        drawn["time"] = drawing(
            "Share of the bare matrix products' speed: higher is better", "ms, one dot per op, shape and dtype",
            "floor / time, %", shares, guide=100,
        )  # fmt: skip
    errors = _series(
        [r for r in right if r["dtype"] == "bf16" and r.get("errors", {}).get("logp_max") and "median_s" in r],
        lambda r: 1e3 * r["median_s"],
        lambda r: r["errors"]["logp_max"],
    )
    if errors:
        drawn["error"] = drawing(
            "Largest error of a log-probability, bfloat16 head: lower is better", "ms, one dot per op and shape",
            "nats from float64", errors, y_log=True,
        )  # fmt: skip
    peaked = [r for r in timed if "nats" in r and "text" not in r and r["op"] == "train" and r["dtype"] == "bf16"]
    if len({r["nats"] for r in peaked}) > 1:
        entropy = _series(
            _least(peaked, "median_s", "nats", "shape"), lambda r: r["nats"], lambda r: 1e3 * r["median_s"]
        )  # fmt: skip
        drawn["entropy"] = drawing(
            f"Time against how flat the distributions are, {peaked[0]['shape']}, bfloat16", "mean entropy, nats",
            "ms, forward and backward", entropy, lines=True,
        )  # fmt: skip
    curve = [r for r in right if r["op"] == "memory" and r.get("extra_bytes", 0) > 0]
    if curve:
        least = _series(
            _least(curve, "extra_bytes", "tokens"), lambda r: r["tokens"], lambda r: r["extra_bytes"]
        )  # fmt: skip
        drawn["memory"] = drawing(
            f"Peak memory beyond inputs and gradients, head {curve[0]['head']}, float32", "tokens",
            "bytes", least, y_log=True, lines=True,
        )  # fmt: skip
    return drawn
