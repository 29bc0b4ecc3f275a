"""Curves are drawn to scale, whatever their range and length."""

from __future__ import annotations

import re

import pytest

from trainer.report.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, chart, ticks


def points(svg: str) -> list[tuple[float, float]]:
    """The coordinates of the last curve drawn."""
    return [tuple(map(float, p.split(","))) for p in re.findall(r'<polyline points="([^"]+)"', svg)[-1].split()]


def test_curves_are_drawn_to_scale():
    svg = chart("t", [Line("s", 0, [0, 5, 10], [0.0, 1.0, 4.0])])
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y2 == pytest.approx(4 * (y0 - y1), abs=0.3)
    assert (x0, y0) == (LEFT, HEIGHT - BOTTOM)
    assert (x2, y2) == (WIDTH - RIGHT, TOP)


def test_long_curves_stay_small_and_keep_their_mean():
    n = 50_000
    svg = chart("t", [Line("s", 0, list(range(n)), [float(i % 2) for i in range(n)])], guide=1.0)
    assert len(svg) < 60_000
    heights = {y for _, y in points(svg)}
    _, (_, half), _ = points(chart("t", [Line("s", 0, [0, 1, 2], [0.0, 0.5, 1.0])]))
    # A fiftieth of the drawing's height; the raw curve would fill it.
    assert max(heights) - min(heights) < HEIGHT / 50
    assert abs(half - sum(heights) / len(heights)) < HEIGHT / 50


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, -3.0], [1e-9, 2e-9], [-1e6, 1e6]])
def test_any_range_can_be_drawn(values):
    svg = chart("t", [Line("s", 0, list(range(len(values))), values)])
    assert "nan" not in svg
    low, *_, high = ticks(min(values), max(values))
    assert low <= min(values) <= max(values) <= high
