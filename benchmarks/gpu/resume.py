"""What a run takes over from the file of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders.base import brief
from benchmarks.gpu.record import Record

SAME = ("device", "dry", "torch", "triton", "driver")  # Rows of both runs stand in one file, under one such heading.


class Refused(Exception):
    """This run cannot go on from that file."""


def earlier(file: Path) -> dict[str, Any]:
    """The contents of the file.

    Raises:
        Refused: It is not one that a run has left.
    """
    try:
        before = json.loads(file.read_text())
        stages, about, sources = (before[key] for key in ("stages", "about", "sources"))
        if not all(isinstance(part, dict) for part in (stages, about, sources)):
            raise ValueError("a part of it is damaged")
        for key in SAME:
            about[key]
        for stage in stages.values():
            if not isinstance(stage["status"], str) or not all(isinstance(row, dict) for row in stage["rows"]):
                raise ValueError("a stage of it is damaged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"--resume {file}: not the file of an earlier run ({brief(error)})") from None
    return {"stages": stages, "about": about, "sources": sources}


def resume(record: Record, file: Path, names: Sequence[str], now: dict[str, Any], sources: dict[str, str]) -> None:
    """Take over the stages that are complete, and those that are not to run now.

    Raises:
        Refused: The file is of other sources, of another device or of other versions.
    """
    before = earlier(file)
    old, then = before["sources"], before["about"]
    changed = sorted(name for name in {*old, *sources} if old.get(name) != sources.get(name))
    if changed:
        raise Refused(f"--resume {file}: kernel sources have changed since, {changed[0]} is one of {len(changed)}")
    for key in SAME:
        if then[key] != now[key]:
            raise Refused(f"--resume {file}: its {key} is {then[key]!r}, here it is {now[key]!r}")
    for name, stage in before["stages"].items():
        if stage["status"] == "running":  # its process ended before it did
            stage.pop("until", None)
            stage["status"] = "stopped"
        if stage["status"] == "done" or name not in names:
            record.stages[name] = stage
