"""Rows of any kind of training data, parsed as training would and yet kept where training would leave them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.data.formats import Record, Unusable, demonstration, is_rank, prompt_only, ranked, ranking
from trainer.data.lines import rows
from trainer.inspect.agreement import FIRST, SECOND, TIE, Judgment

Kind = Literal["ranked", "demonstrations", "labelled", "prompts"]
KINDS = get_args(Kind)
WHO = ("annotator", "annotator_id", "worker", "worker_id", "labeler", "labeller")
SIDES = {"chosen": [0, 1], "rejected": [1, 0], "tie": [0, 0]}
SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One well-formed line."""

    number: int
    raw: Record
    prompt: str
    responses: list[str]
    ranks: list[float]
    """Lower is better; empty where nothing is compared."""
    left_out: str
    """Why training would leave it out; empty if it would not."""

    def pairs(self) -> Iterator[tuple[str, str]]:
        """(better, worse) for every pair of unequal rank."""
        ranked = list(zip(self.responses, self.ranks, strict=True)) if self.ranks else []
        for mine, rank in ranked:
            yield from ((mine, theirs) for theirs, other in ranked if rank < other)


@dataclass
class Contents:
    """A data file as `inspect` sees it."""

    kind: Kind
    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    @property
    def left_out(self) -> Counter[str]:
        """Reasons, without their explanation in brackets, and how many rows each concerns."""
        return Counter(row.left_out.split(" (")[0] for row in self.rows if row.left_out)


def read(path: str | Path, kind: Kind | None = None) -> Contents:
    """Reads a file; unlike training it never refuses it for its bad lines.

    Args:
        path: jsonl, jsonl.gz or parquet.
        kind: What to make of the lines; None looks at the first that has known fields.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not data, it holds no line that could be parsed, or its kind cannot be told.
    """
    numbered = list(rows(path))
    parsed = [row for _, row in numbered if isinstance(row, dict)]
    if not parsed:
        first = next((str(row) for _, row in numbered if isinstance(row, ValueError)), "the file is blank")
        raise ValueError(f"{path} holds no JSON object: {first}")
    contents = Contents(kind or _kind(parsed[:100]))
    for number, row in numbered:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"want a JSON object, got {type(row).__name__}")
            contents.rows.append(_row(number, row, contents.kind))
        except ValueError as error:
            contents.bad.append((number, str(error)))
    if not contents.rows:
        number, reason = contents.bad[0]
        raise ValueError(f"{path} holds no {contents.kind}; line {number}: {reason}")
    return contents


def kind_of(row: Record) -> Kind | None:
    """What a line is, by its fields; None for a line that could be anything.

    >>> kind_of({"chosen": "a", "rejected": "b"}), kind_of({"question": "q", "answer": "a"}), kind_of({"prompt": "p"})
    ('ranked', 'demonstrations', None)
    """
    if {"chosen", "rejected"} <= row.keys() or "responses" in row:
        return "ranked"
    if "label" in row and row.keys() & {"response", "completion", "output"}:
        return "labelled"
    if row.keys() & {"response", "completion", "output", "answer", "text"}:
        return "demonstrations"
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return "demonstrations" if isinstance(last, dict) and last.get("role") == "assistant" else None


def _kind(rows: Sequence[Record]) -> Kind:
    for row in rows:
        if (found := kind_of(row)) is not None:
            return found
    return "prompts"


def judgments(row: Row) -> Iterator[Judgment]:
    """What annotators said about the pairs of one row.

    `annotations` holds one entry per annotator, ranks or, for a pair, one of "chosen", "rejected", "tie"; a row with
    the field `annotator` (or a synonym, see `WHO`) is that annotator's and says what its ranks say. `gold` is the
    known right answer in the same words.

    Raises:
        ValueError: A field is none of these.
    """
    said = row.raw.get("annotations")
    if said is not None and not isinstance(said, dict):
        raise ValueError(f"annotations must be an object of annotator: choice, got {type(said).__name__}")
    known = [name for name in WHO if row.raw.get(name) is not None]
    # In parquet, an annotator who has not seen this row is there, and null.
    heard = {str(who): choice for who, choice in (said or {}).items() if choice is not None}
    opinions = {who: _ranks(row, "annotations", choice) for who, choice in heard.items()}
    if not opinions and known:
        opinions = {str(row.raw[known[0]]): row.ranks}
    gold = row.raw.get("gold")
    truth = None if gold is None else _ranks(row, "gold", gold)
    for who, ranks in opinions.items():
        for i, mine in enumerate(row.responses):
            for j in range(i + 1, len(row.responses)):
                if mine != row.responses[j]:
                    yield _judgment(row, i, j, who, ranks, truth)


def _judgment(row: Row, i: int, j: int, who: str, ranks: list[float], truth: list[float] | None) -> Judgment:
    # The order of a pair is that of its texts: two rows may name the same replies the other way round.
    if row.responses[j] < row.responses[i]:
        i, j = j, i
    pair: Hashable = (row.prompt, row.responses[i], row.responses[j])
    return Judgment(pair, who, _choice(ranks, i, j), None if truth is None else _choice(truth, i, j))


def _choice(ranks: list[float], i: int, j: int) -> int:
    return TIE if ranks[i] == ranks[j] else FIRST if ranks[i] < ranks[j] else SECOND


def _ranks(row: Row, name: str, choice: Any) -> list[float]:
    if isinstance(choice, str) and choice in SIDES and len(row.responses) == 2:
        sides = SIDES[choice]
        return [float(x) for x in (sides if row.ranks != [1, 0] else sides[::-1])]
    ranks = choice if isinstance(choice, list) else []
    if len(ranks) == len(row.responses) and all(isinstance(x, bool) or is_rank(x) for x in ranks):
        return [float(x) for x in ranks]
    wanted = "chosen, rejected, tie or " if len(row.responses) == 2 else ""
    raise ValueError(f"{name}: got {choice!r:.60}, want {wanted}a list of {len(row.responses)} ranks")


def _row(number: int, raw: Record, kind: Kind) -> Row:
    if kind == "ranked":
        record = ranking(raw)
        made = Row(number, raw, record["prompt"], record["responses"], list(record["ranks"]), _why_not(ranked, raw))
        list(judgments(made))  # raises where an annotation is malformed
        return made
    if kind == "prompts":
        return Row(number, raw, prompt_only(raw)["prompt"], [], [], "")
    if kind == "labelled" and raw.get("label") not in (True, False, 0, 1):
        raise ValueError(f"label: got {raw.get('label')!r:.40}, want true or false")
    try:
        record = demonstration(raw)
    except Unusable as reason:
        # An empty reply has no record of its own; the prompt still counts in overlap and duplicates.
        return Row(number, raw, prompt_only(raw)["prompt"], [""], [], str(reason))
    return Row(number, raw, record["prompt"], [record["response"]], [], "")


def _why_not(parse: Any, raw: Record) -> str:
    try:
        parse(raw)
    except Unusable as reason:
        return str(reason)
    return ""
