"""`inspect` as a stage of a pipeline: the same facts, in a run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.statistics import Estimate
from trainer.base.typed_options import check_types, settle
from trainer.inspect.command import inspect, plain
from trainer.inspect.rows import Kind
from trainer.inspect.screen import screen
from trainer.run.log import RunLog
from trainer.run.mark import opened

FACTS = "facts.json"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What decides the worth of preference data, before you train on it."""

    data: Path
    """The file to look at."""
    out: Path = Path("runs/inspect")
    """Folder for facts.json."""
    held_out: Path | None = None
    """Prompts that must not occur in data."""
    tokenizer: str | None = None
    """Count lengths in this model's tokens as well."""
    category: str = "category"
    """Field with a row's category."""
    kind: Kind | None = None
    """What the lines are; by default told by their fields."""
    baselines: bool = True
    """Fit the bag of words."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        settle(self)
        check_types(self)


def inspect_data(cfg: InspectConfig, log: RunLog | None = None) -> dict[str, Any]:
    """Looks, prints, and writes ``facts.json`` and a summary with everything that has an interval.

    Args:
        cfg: The configuration.
        log: Where to log; None makes a log in ``cfg.out``.
    """
    log = opened(cfg, "inspect", log)
    facts = inspect(
        cfg.data, kind=cfg.kind, held_out=cfg.held_out, tokenizer=cfg.tokenizer, category=cfg.category,
        with_baselines=cfg.baselines,
    )  # fmt: skip
    log.note(screen(facts))
    text = json.dumps(plain(facts), indent=2, ensure_ascii=False, allow_nan=False)
    (cfg.out / FACTS).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    shown: dict[str, Any] = {"lines": facts["file"]["lines"], "bad_lines": facts["file"]["bad"]}
    for section in ("comparisons", "baselines"):
        found = facts.get(section, {})
        shown |= {name: value.to_dict() for name, value in found.items() if isinstance(value, Estimate)}
    shown["adversarial_share"] = facts["adversarial"]["share"]
    shown["personal_data"] = sum(x[w]["found"] for x in facts["personal"].values() for w in ("prompts", "replies"))
    if "overlap" in facts:
        shown["held_out_prompts_in_data"] = facts["overlap"]["same_prompt"]
    log.summary({"inspect": shown})
    return facts
