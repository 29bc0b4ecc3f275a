"""Reading training data: jsonl (also gzipped) or parquet in, clean records out, and a word about every line left out.

Two kinds of line are left out:

* **Bad**: invalid JSON, a missing field, a wrong type. Somebody made a mistake. The first five are shown with their
  line numbers; above 1 % of the lines nothing is trained.
* **Unusable**: well-formed, but with nothing to teach: an empty reply, identical replies of different rank, a group in
  which all ranks tie. Real collections hold some, so they do not count towards the 1 %; they are counted and explained.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.data_file import rows, sha256
from trainer.data_format import Record, Render, Unusable, demonstration, labelled, prompt_only, ranked, render_turns

__all__ = ["BAD_LIMIT", "Kind", "Record", "Render", "read", "render_turns", "sha256"]

Kind = Literal["demonstrations", "ranked", "labelled", "prompts"]
BAD_LIMIT = 0.01
SHOWN = 5
PARSERS: dict[str, Callable[[Record, Render], Record]] = {
    "demonstrations": demonstration,
    "ranked": ranked,
    "labelled": labelled,
    "prompts": prompt_only,
}


def read(
    path: str | Path,
    kind: Kind,
    *,
    render: Render = render_turns,
    note: Callable[[str], None] | None = None,
) -> list[Record]:
    r"""Reads a whole file of one kind of record.

    Args:
        path: A jsonl, jsonl.gz or parquet file.
        kind: What to make of each line. `demonstrations` gives `{"prompt", "response"}`; `ranked` gives `{"prompt",
            "responses", "ranks"}` with lower ranks better, equal ranks tied, and a preference pair as two responses of
            ranks [0, 1]; `labelled` gives `{"prompt", "responses", "labels"}`, true where desirable; `prompts` gives
            `{"prompt", "extra"}`, where `extra` holds the other fields.
        render: Turns the messages of a conversation into a prompt; the default writes `\n\nHuman:` and
            `\n\nAssistant:` turns. Pass the tokenizer's chat template for a model that was trained with one.
        note: Receives one message about bad and one about unusable lines, if there are any; standard error by default.

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
    bad: list[tuple[int, str]] = []
    unusable: list[tuple[int, str]] = []
    for number, row in rows(path):
        try:
            records.append(_record(row, kind, render))
        except ValueError as error:
            bad.append((number, str(error)))
        except Unusable as reason:
            unusable.append((number, str(reason)))
    total = len(records) + len(bad) + len(unusable)
    if len(bad) > BAD_LIMIT * total:
        raise ValueError(f"{_bad_report(path, bad, total)}\nMore than {BAD_LIMIT:.0%} is too many to train on {kind}.")
    if bad:
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


def _bad_report(path: str | Path, bad: list[tuple[int, str]], total: int) -> str:
    shown = "".join(f"\n  line {number}: {reason}" for number, reason in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{path}: {len(bad)} of {total} lines {_are(bad)} bad ({len(bad) / total:.2%}):{shown}{more}"


def _unusable_report(path: str | Path, unusable: list[tuple[int, str]], total: int) -> str:
    text = f"{path}: {len(unusable)} of {total} lines {_are(unusable)} well-formed but left out:"
    for reason, count in Counter(reason for _, reason in unusable).most_common():
        numbers = [str(number) for number, why in unusable if why == reason]
        more = ", ..." if count > SHOWN else ""
        text += f"\n  {count} with {reason}: line{'s' * (count > 1)} {', '.join(numbers[:SHOWN])}{more}"
    return text


def _are(lines: list[tuple[int, str]]) -> str:
    return "is" if len(lines) == 1 else "are"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
