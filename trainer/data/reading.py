"""Reading training data: jsonl (also gzipped) or parquet in, clean records out, and a word about every line left out.

Two kinds of line are left out:

* **Bad**: invalid JSON, a missing field, a wrong type. Somebody made a mistake. The first five are shown with their
  line numbers; above 1 % of the lines nothing is trained.
* **Unusable**: well-formed, but with nothing to teach: an empty reply, identical replies of different rank, a group in
  which all ranks tie. Real collections hold some, so they do not count towards the 1 %; they are counted and explained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.base.console import say
from trainer.data.formats import Record, Unusable, demonstration, labelled, prompt_only, ranked, text_only
from trainer.data.hashing import sha256
from trainer.data.lines import rows
from trainer.data.prompt import Render, render_turns

__all__ = ["BAD_LIMIT", "Kind", "Record", "Render", "read", "render_turns", "sha256"]

Kind = Literal["demonstrations", "ranked", "labelled", "prompts", "texts"]
BAD_LIMIT = 0.01
SHOWN = 5
PARSERS: dict[str, Callable[[Record, Render], Record]] = {
    "demonstrations": demonstration,
    "ranked": ranked,
    "labelled": labelled,
    "prompts": prompt_only,
    "texts": text_only,
}


def read(
    path: str | Path,
    kind: Kind,
    *,
    render: Render = render_turns,
    note: Callable[[str], None] | None = None,
    lines: list[int] | None = None,
) -> list[Record]:
    r"""Reads a whole file of one kind of record.

    Args:
        path: A jsonl, jsonl.gz or parquet file.
        kind: What to make of each line. `demonstrations` gives `{"prompt", "response"}`; `ranked` gives `{"prompt",
            "responses", "ranks"}` with lower ranks better, equal ranks tied, and a preference pair as two responses of
            ranks [0, 1]; `labelled` gives `{"prompt", "responses", "labels"}`, true where desirable; `prompts` gives
            `{"prompt", "extra"}`, where `extra` holds the other fields; `texts` gives `{"text"}`.
        render: Turns the messages of a conversation into a prompt; the default writes `\n\nHuman:` and
            `\n\nAssistant:` turns. Pass the tokenizer's chat template for a model that was trained with one.
        note: Receives one message about bad and one about unusable lines, if there are any; standard error by default.
        lines: Receives the number of each record's line.

    Returns:
        The records in the order of the file. Prompt and reply are kept character for character: their concatenation
        is the transcript that they were cut from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `kind` is unknown, the file is not data, more than 1 % of its lines are bad, or none is left.
    """
    if kind not in PARSERS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(PARSERS)}")
    note = note or _to_stderr
    records: list[Record] = []
    bad = LeftOut()
    unusable: dict[str, LeftOut] = defaultdict(LeftOut)  # Their keys are reasons, of which there are three.
    for number, row in rows(path):
        try:
            records.append(_record(row, kind, render))
            if lines is not None:
                lines.append(number)
        except ValueError as error:
            bad.add(number, str(error))
        except Unusable as reason:
            unusable[str(reason)].add(number, str(reason))
    total = len(records) + bad.count + sum(lines.count for lines in unusable.values())
    if bad.count > BAD_LIMIT * total:
        raise ValueError(
            f"{_bad_report(path, bad, total)}\nAt most {BAD_LIMIT:.0%} of the lines may be bad, for {kind}."
        )
    if bad.count:
        note(f"{_bad_report(path, bad, total)}\nThey are left out.")
    if unusable:
        note(_unusable_report(path, unusable, total))
    if not records:
        raise ValueError(f"{path} holds no {kind}: " + (f"all {total} lines are unusable" if total else "it is blank"))
    return records


def _record(row: Any, kind: Kind, render: Render) -> Record:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"want a JSON object, got {type(row).__name__}")
    return PARSERS[kind](row, render)


class LeftOut:
    """How many lines are left out, and the first of them: a file may hold more bad lines than there is memory."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[tuple[int, str]] = []

    def add(self, number: int, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((number, reason))


def _bad_report(path: str | Path, bad: LeftOut, total: int) -> str:
    shown = "".join(f"\n  line {number}: {reason}" for number, reason in bad.first)
    more = f"\n  and {bad.count - SHOWN} more" if bad.count > SHOWN else ""
    return f"{path}: {bad.count} of {total} lines {_are(bad.count)} bad ({bad.count / total:.2%}):{shown}{more}"


def _unusable_report(path: str | Path, unusable: dict[str, LeftOut], total: int) -> str:
    count = sum(lines.count for lines in unusable.values())
    text = f"{path}: {count} of {total} lines {_are(count)} well-formed but left out:"
    for reason, lines in sorted(unusable.items(), key=lambda item: -item[1].count):
        numbers = ", ".join(str(number) for number, _ in lines.first) + (", ..." if lines.count > SHOWN else "")
        text += f"\n  {lines.count} with {reason}: line{'s' * (lines.count > 1)} {numbers}"
    return text


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _to_stderr(text: str) -> None:
    say(text, error=True)
