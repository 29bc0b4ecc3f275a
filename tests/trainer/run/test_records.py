"""Logs are read back as far as they go, as we would have written them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.run.records import record_of, records


def test_what_is_no_object_is_left_out_and_counted(tmp_path: Path) -> None:
    notes: list[str] = []
    (path := tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n[2]\n\n\xff\n{"b": "x\xe2\x80\xa8y"}\n')
    assert records(path, notes.append) == [{"a": 1}, {"b": "x\u2028y"}]
    (note,) = notes
    assert "2 lines are left out, the first is line 2" in note


def test_a_line_that_a_crash_cut_short_is_no_news(tmp_path: Path) -> None:
    notes: list[str] = []
    (path := tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n{"a": 2')
    assert records(path, notes.append) == [{"a": 1}]
    assert records(tmp_path / "nowhere.jsonl", notes.append) == []
    assert not notes


@pytest.mark.parametrize(
    ("text", "value"),
    [("NaN", None), ("-Infinity", None), ("1e999", None), ("9" * 400, None), ("-7", -7), ("2e-1", 0.2)],
)
def test_numbers_are_those_that_a_float_holds(text: str, value: float | None) -> None:
    found = record_of(f'{{"x": {text}}}'.encode())["x"]
    assert (found, type(found)) == (value, type(value))
