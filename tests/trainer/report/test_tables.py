"""Tables of a summary."""

from __future__ import annotations

import re

import pytest

from trainer.report.tables import tables


def test_intervals_of_a_row_are_drawn_on_one_scale():
    row = tables({"a": {"x": {"value": 0.0, "half": 1.0}}, "b": {"x": {"value": 2.0, "half": 1.0}}})
    centres = [float(c) for c in re.findall(r'cx="([\d.]+)"', row)]
    ends = [float(e) for e in re.findall(r'<line x1="[\d.]+" x2="([\d.]+)"', row)]
    assert centres[1] - centres[0] == pytest.approx(2 * (ends[0] - centres[0]), abs=0.2)


def test_sections_of_sections_are_tables_of_their_own():
    page = tables({"arms": {"healthy": {"judge": 3.0}, "hacked": {"judge": 1.0}}, "seconds": 90.0})
    assert "<caption>Arms</caption>" in page
    assert "<th>healthy</th><th>hacked</th>" in page
    assert "<b>90.0</b>" in page
