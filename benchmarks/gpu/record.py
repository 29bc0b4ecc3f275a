"""The files that a run leaves: ``gpu.json``, which is whole at any time, and ``gpu.log``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

NAME, LOG = "gpu.json", "gpu.log"
NO_TIME = "no time was left"
LEFT_OUT = ("least", "most", "rounds")  # of the table, which has no room for them
TURN = {"head": 4, "peers": 3}  # lines of the table at a time; one of the others


class Record:
    """What is known so far: ``stages`` maps names to status, seconds and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / NAME
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stages": {}}

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.content["stages"]

    def write(self) -> None:
        """Whoever reads sees the old file or the new one."""
        draft = self.folder / f"{NAME}.draft"
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.folder / NAME)

    def begin(self, stage: str, seconds: float) -> None:
        self.stages[stage] = {"status": "running", "given": round(seconds, 1), "until": time.time() + seconds}
        self.stages[stage]["rows"] = []
        self.write()

    def add(self, stage: str, row: dict[str, Any]) -> None:
        self.stages[stage]["rows"].append(row)
        self.write()

    def end(self, stage: str, status: str, why: str | None = None) -> None:
        """``status`` is "done", "partly" where time cut some of its work, "failed", "stopped", or "skipped"."""
        here = self.stages.setdefault(stage, {"rows": []})
        if "until" in here:
            here["seconds"] = round(time.time() - here.pop("until") + here["given"], 1)
        here["status"] = status
        if why is not None:
            here["why"] = why
        self.write()
        self.say(f"{stage}: {status} after {here.get('seconds', 0)} s{f', {why}' if why else ''}")

    def say(self, text: str) -> None:
        """To the log and to the screen."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        with open(self.folder / LOG, "a") as log:
            log.write(line + "\n")
        print(line[:400], flush=True)


def is_bad(row: dict[str, Any]) -> bool:
    return "failed" in row or row.get("ok") is False


def is_cut(row: dict[str, Any]) -> bool:
    return row.get("skipped") == NO_TIME or row.get("complete") is False


def _line(row: dict[str, Any]) -> str:
    shown = {key: value for key, value in row.items() if key not in LEFT_OUT}
    return " ".join(f"{k}={json.dumps(v) if isinstance(v, dict | list) else v}" for k, v in shown.items())


def _only_right(row: dict[str, Any]) -> bool:
    """Whether there is no more to say about it than that."""
    return row.get("ok") is True and row.get("same_bits") is not False and not {"ms", "us"} & row.keys()


def table(content: dict[str, Any], most: int = 60, width: int = 180) -> list[str]:
    """At most so many lines: the device, each stage, what went wrong, and then some rows of each stage."""
    about = content.get("about", {})
    lines = [
        " ".join(f"{key}={about[key]}" for key in about if key not in ("entry", "carried")),
        f"entry: {about.get('entry')}; carried: {about.get('carried')}",
    ]
    wrong: list[str] = []
    shown: dict[str, list[str]] = {}
    for name, stage in content["stages"].items():
        rows = stage.get("rows", [])
        bad = [row for row in rows if is_bad(row)]
        skips = sum("skipped" in row for row in rows)
        checks = f", {sum(row.get('ok') is True for row in rows)} right" if any("ok" in row for row in rows) else ""
        lines.append(
            f"{name}: {stage['status']}, {stage.get('seconds', 0)} s, {len(rows)} rows{checks}, {len(bad)} bad, "
            f"{skips} skipped{', ' + stage['why'] if 'why' in stage else ''}"
        )
        wrong += [f"  BAD {name}: {_line(row)}" for row in bad]
        others = sorted((row for row in rows if not is_bad(row) and not _only_right(row)), key=lambda r: "skipped" in r)
        shown[name] = [f"  {name}: {_line(row)}" for row in others]
    room = most - len(lines)
    kept = wrong if len(wrong) <= room // 3 else [*wrong[: room // 3 - 1], f"  and {len(wrong) - room // 3 + 1} more"]
    room -= len(kept)
    chosen: dict[str, int] = dict.fromkeys(shown, 0)
    while room > 0 and any(chosen[name] < len(shown[name]) for name in shown):
        for name in shown:
            more = min(TURN.get(name, 1), room, len(shown[name]) - chosen[name])
            chosen[name] += more
            room -= more
    lines += kept + [line for name, count in chosen.items() for line in shown[name][:count]]
    return [line[:width] for line in lines[:most]]
