"""What a run folder's logs say, read back; perhaps somebody changed them meanwhile, or they are of others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def records(path: Path, note: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The objects of a log; none without the file.

    Args:
        path: Lines of JSON. They end where a line feed is and nowhere else: a text may hold other separators.
        note: Told once how many lines are no objects and are left out, if any. The last line does not count where it
            has no end: a crash cut it short, or it is being written.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    found, lost = [], []
    for number, line in enumerate([*lines, last], start=1):
        try:
            found.append(record_of(line))
        except (ValueError, RecursionError) as error:
            if line.strip() and number <= len(lines):
                lost.append((number, error))
    if lost and note is not None:
        number, error = lost[0]
        are = "line is" if len(lost) == 1 else "lines are"
        note(f"{path}: {len(lost)} {are} left out, the first is line {number} ({error})")
    return found


def record_of(text: bytes) -> dict[str, Any]:
    """An object as we write them: a number that is not finite, or that no float can hold, is null.

    Raises:
        ValueError: It is none, or not UTF-8.
    """

    def number(digits: str) -> float | int | None:
        value = float(digits)
        return None if math.isinf(value) else int(digits) if digits.lstrip("-").isdigit() else value

    options = {"parse_int": number, "parse_float": number, "parse_constant": lambda _: None}
    record = json.loads(text.decode("utf-8"), **options)
    if not isinstance(record, dict):
        raise ValueError(f"want a JSON object, got {type(record).__name__}")
    return record
