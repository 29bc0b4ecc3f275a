"""Fields of the data without which a reward or judge has nothing to say, looked for before any work.

``exact_answer`` wants ``answer``. A function of one's own names the fields that it wants in an attribute:
``score.fields = ("answer",)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.base.address import is_address
from trainer.base.paths import resolve
from trainer.data import reading as data
from trainer.data.chat import rendered
from trainer.models.files import tokenizer_of
from trainer.rewards.compare import COMPARE
from trainer.rewards.exact_answer import exact_answer, number_of
from trainer.rewards.names import BUILT_IN, function_of, is_model

SHOWN = 5


def read_prompts(
    path: Path,
    sources: Iterable[tuple[str, str]],
    *,
    render: data.Render = data.render_turns,
    note: Callable[[str], None] | None = None,
    most: int | None = None,
    load: bool = True,
) -> list[data.Record]:
    """Prompts and whatever else stands in their records, which every reward and judge can judge.

    Args:
        path: A file of prompts.
        sources: Options and the rewards or judges that they name (``trainer.rewards.names.sources_of``).
        render: As ``trainer.data.reading.read`` takes it (``reading`` below).
        note: As ``reading.read`` takes it; also hears of answers in which ``exact_answer`` finds no number.
        most: How many records are used, from the top; None is all of them.
        load: Import the module of a function, which says what it wants; otherwise it is not asked.

    Raises:
        ValueError: What ``reading.read`` raises; a record lacks a field that one of them wants; none of them has
            a number for ``exact_answer``; or a function's ``fields`` are no names.
    """
    lines: list[int] = []
    records = data.read(path, "prompts", render=render, note=note, lines=lines)[:most]
    for name, option in {name: option for option, name in sources}.items():
        for field in wanted(name, option, load=load):
            for line, record in zip(lines, records, strict=False):
                if record["extra"].get(field) is None:
                    has = f"{', '.join(sorted(record['extra'])):.200}" or "a prompt and nothing else"
                    wants = f"{name} wants the field {field} in every record"
                    raise ValueError(f"{option}: {wants}, and {path} line {line} has none (it has {has})")
        if is_model(name):
            _readable(name, option, path, lines, records)
        if BUILT_IN.get(name) is exact_answer:
            _numbers(option, path, lines, records, note)
    return records


def _readable(name: str, option: str, path: Path, lines: Sequence[int], records: Sequence[data.Record]) -> None:
    """Refuses prompts that the template of a reward model refuses, which would end the run when they are drawn."""
    tokenizer = tokenizer_of(resolve(name))
    for line, record in zip(lines, records, strict=False):
        try:
            rendered(tokenizer, record["prompt"])
        except ValueError as error:
            raise ValueError(f"{option}: {name} cannot read {path} line {line}: {error}") from None


def wanted(name: str, option: str, *, load: bool = True) -> tuple[str, ...]:
    """Names of the fields that a reward or judge wants in every record.

    Raises:
        ValueError: ``fields`` of a function holds something else.
    """
    given = name not in BUILT_IN and (is_address(name) or name.startswith(COMPARE) or is_model(name) or not load)
    fields: Any = () if given else getattr(function_of(name, option), "fields", ())
    if not isinstance(fields, tuple | list) or not all(isinstance(field, str) for field in fields):
        raise ValueError(f"{option}: {name} has fields = {fields!r:.60}, want the names of fields, as ('answer',)")
    return tuple(fields)


def _numbers(
    option: str, path: Path, lines: Sequence[int], records: Sequence[data.Record], note: Callable[[str], None] | None
) -> None:
    """Refuses answers of which none has a number, and says how many there are of the others."""
    answers = zip(lines, (record["extra"]["answer"] for record in records), strict=False)
    bad = [(line, answer) for line, answer in answers if number_of(answer) is None]
    if not bad:
        return
    if len(bad) == len(records):
        line, answer = bad[0]
        wants = f"exact_answer wants a number in the field answer, and no record of {path} has one"
        raise ValueError(f"{option}: {wants}; line {line} has {answer!r:.60}")
    shown = ", ".join(str(line) for line, _ in bad[:SHOWN]) + ", ..." * (len(bad) > SHOWN)
    if note is not None:
        have = "has an answer" if len(bad) == 1 else "have answers"
        note(
            f"{path}: {len(bad)} of {len(records)} records {have} without a number, to which exact_answer gives 0 "
            f"whatever the response: line{'s' * (len(bad) > 1)} {shown}"
        )
