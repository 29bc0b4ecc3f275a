"""`rlhf-train split`: holds prompts out, so that what is evaluated was not trained on."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.typed_options import check_types, settle
from trainer.data.formats import prompt_only
from trainer.data.lines import rows
from trainer.run.folder import refuse_inputs
from trainer.run.log import RunLog
from trainer.run.mark import opened

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Two files out of one: rows of one prompt stay together."""

    data: Path
    """Data of any kind, .jsonl, .jsonl.gz or parquet."""
    out: Path = Path("runs/split")
    """Folder for train.jsonl and held_out.jsonl."""
    held_out: float = 0.1
    """Share of the prompts that is held out."""
    seed: int = 0
    """Another seed holds out other prompts."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        settle(self)
        check_types(self)


def check_split(cfg: SplitConfig) -> None:
    """Refuses a share that would leave nothing on one side.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    if not 0 < cfg.held_out < 1:
        raise ValueError(f"held_out: got {cfg.held_out}, want a share between 0 and 1")


def split(cfg: SplitConfig, log: RunLog | None = None) -> dict[str, int]:
    """Writes both files; rows are as they were but for fields that are null, in their order.

    Which prompts are held out depends on their text and the seed alone: a prompt that occurs in several files, or in a
    file that grew, is always on the same side.

    Args:
        cfg: The configuration.
        log: Where to log; None makes a log in ``cfg.out``.

    Returns:
        Rows per file.

    Raises:
        ValueError: The file is not data, or one side would be empty.
    """
    check_split(cfg)
    refuse_inputs(cfg)
    log = opened(cfg, "split", log)
    parts: dict[str, list[str]] = {TRAIN: [], HELD_OUT: []}
    lost: list[tuple[int, str]] = []
    for number, row in rows(cfg.data):
        try:
            prompt = _prompt(row)
        except ValueError as error:
            lost.append((number, str(error)))
            continue
        digest = hashlib.sha256(f"{cfg.seed} {prompt}".encode()).digest()
        held = int.from_bytes(digest[:8], "big") < math.ldexp(cfg.held_out, 64)
        line = json.dumps(row, ensure_ascii=False, default=str)  # Parquet has dates, which JSON has not.
        parts[HELD_OUT if held else TRAIN].append(line)
    for number, reason in lost[:1]:
        log.warn(f"{cfg.data}: {len(lost)} lines are bad and left out, the first is line {number}: {reason}")
    counts = {name: len(lines) for name, lines in parts.items()}
    if not all(counts.values()):
        raise ValueError(f"held_out: got {cfg.held_out} of {cfg.data}, which gives {counts}, want rows in both")
    for name, lines in parts.items():
        (cfg.out / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    log.table("Split", [(name, f"{count} rows") for name, count in counts.items()])
    log.summary({"split": {name.removesuffix(".jsonl"): count for name, count in counts.items()}})
    return counts


def _prompt(row: Any) -> str:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"want a JSON object, got {type(row).__name__}")
    if isinstance(row.get("text"), str):
        return row["text"]
    return prompt_only(row)["prompt"]
