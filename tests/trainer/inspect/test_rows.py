"""Rows that mean nothing are bad lines."""

from __future__ import annotations

import pytest

from tests.trainer.inspect.test_command import pair
from trainer.inspect.rows import read


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"annotations": ["a"]}, "annotations must be an object"),
        ({"annotations": {"a": "left"}}, "annotations: got 'left', want chosen, rejected, tie"),
        ({"annotations": {"a": [1, 2, 3]}}, "want chosen, rejected, tie or a list of 2 ranks"),
        ({"gold": 3, "annotator": "a"}, "gold: got 3"),
    ],
)
def test_annotations_that_mean_nothing_are_bad_lines(write, field, reason):
    contents = read(write(pair("p", "a", "b"), pair("p", "a", "b", **field)))
    ((number, why),) = contents.bad
    assert number == 2
    assert reason in why
