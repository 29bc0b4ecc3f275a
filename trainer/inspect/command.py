"""`rlhf-train inspect DATA`: what decides the worth of preference data, on one screen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from trainer.base.console import Parser, say
from trainer.data.hashing import sha256
from trainer.inspect import facts as stats
from trainer.inspect.adversarial import adversarial
from trainer.inspect.personal_data import personal
from trainer.inspect.rows import KINDS, SHOWN, Contents, read
from trainer.inspect.screen import findings, screen
from trainer.inspect.tasks import tasks

ABOUT = """\
What decides the worth of training data: lengths, ties, duplicates, empty and
identical replies, agreement between annotators, shares per category, overlap
with held-out prompts, and two baselines that a reward model has to beat. Also
which kinds of task the prompts are, how many of them are adversarial, and
personal data, which is counted and not shown.

Reads what the stages read: jsonl, jsonl.gz or parquet with demonstrations,
pairs, ranked lists, labelled replies or prompts."""
FIELDS = """\
fields that only inspect reads:
  category     any text, or a list of texts (see --category)
  annotator    who judged this row; several rows may judge one pair
  annotations  {"ann": "chosen", "bob": "rejected", "eve": "tie"}, or ranks:
               {"ann": [0, 1, 2], "bob": [1, 0, 2]}
  gold         the known right answer: chosen, rejected, tie, or ranks"""


def main(argv: Sequence[str], prog: str = "rlhf-train inspect") -> int:
    """Prints the facts about a file.

    Args:
        argv: Arguments after the subcommand.
        prog: For the usage line.

    Returns:
        0; problems of the data are what it is there to show.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is not data, or no line of it could be read.
    """
    options = _options(argv, prog)
    if options.json is not None and options.json.exists():
        for path in filter(None, (options.data, options.held_out)):
            if path.exists() and path.samefile(options.json):
                raise ValueError(f"--json: {options.json} is the data itself, want another file")
    facts = inspect(
        options.data, kind=options.kind, held_out=options.held_out, tokenizer=options.tokenizer,
        category=options.category, with_baselines=not options.no_baselines,
    )  # fmt: skip
    say(screen(facts))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(facts), indent=2, ensure_ascii=False, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return 0


def inspect(
    data: str | Path,
    *,
    kind: Any = None,
    held_out: str | Path | None = None,
    tokenizer: str | None = None,
    category: str = "category",
    with_baselines: bool = True,
) -> dict[str, Any]:
    """The facts about a file, as `--json` writes them, with `Estimate` where a number has an interval.

    Args:
        data: jsonl, jsonl.gz or parquet.
        kind: ranked, demonstrations, labelled or prompts; None looks at the fields.
        held_out: Another file, whose prompts should not occur in `data`.
        tokenizer: A local directory or hub id; lengths are then counted in tokens too.
        category: The field that holds a row's category.
        with_baselines: Fit the bag of words, a second or two per thousand pairs.

    Returns:
        Sections by name; a section that does not apply is missing.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is not data, or no line of it could be read.
    """
    contents = read(data, kind)
    theirs = read(held_out) if held_out is not None else None
    rows = contents.rows
    ranked = contents.kind == "ranked"
    facts: dict[str, Any] = {
        "file": _file(data, contents),
        "words": stats.lengths(rows, lambda texts: [len(text.split()) for text in texts]),
        "tokens": stats.lengths(rows, _counter(tokenizer)) if tokenizer else None,
        "markup": _markup(contents, tokenizer) if tokenizer else None,
        "comparisons": stats.comparisons(rows) if ranked else None,
        "lists": stats.lists(rows) if ranked else None,
        "desirable": stats.labels(rows) if contents.kind == "labelled" else None,
        "transcripts": stats.transcripts(rows),
        "duplicates": stats.duplicates(rows),
        "annotators": stats.annotators(rows),
        "categories": stats.categories(rows, category),
        "tasks": tasks(rows),
        "adversarial": adversarial(rows, category),
        "personal": personal(rows),
        "overlap": stats.overlap(rows, theirs) if theirs is not None else None,
        "baselines": stats.baselines(rows) if ranked and with_baselines else None,
    }
    facts = {name: section for name, section in facts.items() if section is not None}
    facts["stands_out"] = findings(facts)
    return facts


def plain(value: Any) -> Any:
    """Facts as JSON takes them: intervals become objects, not-a-number becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _file(path: str | Path, contents: Contents) -> dict[str, Any]:
    lines = len(contents.rows) + len(contents.bad)
    return {
        "path": str(path), "sha256": sha256(path), "kind": contents.kind, "lines": lines, "bad": len(contents.bad),
        "first_bad": [{"line": number, "reason": reason} for number, reason in contents.bad[:SHOWN]],
        "left_out": dict(contents.left_out.most_common()),
    }  # fmt: skip


def _markup(contents: Contents, name: str) -> dict[str, Any] | None:
    """Prompts that hold special tokens of a model with a chat template, which a training run refuses."""
    from trainer.base.paths import resolve
    from trainer.data.tokenizer import markers
    from trainer.models.files import tokenizer_of

    tokenizer = tokenizer_of(resolve(name))
    found = [row for row in contents.rows if any(marker in row.prompt for marker in markers(tokenizer))]
    if not found or not getattr(tokenizer, "chat_template", None):
        return None
    return {"prompts": len(found), "line": found[0].number, "model": name}


def _counter(name: str) -> Callable[[Sequence[str]], list[int]]:
    from trainer.base.paths import resolve
    from trainer.data.tokenizer import encode
    from trainer.models.files import tokenizer_of

    tokenizer = tokenizer_of(resolve(name))
    return lambda texts: [len(ids) for ids in encode(tokenizer, texts)]


def _options(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=ABOUT, epilog=FIELDS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the file to look at")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="prompts that must not occur in DATA")
    parser.add_argument("--tokenizer", metavar="MODEL", help="count lengths in this model's tokens as well")
    parser.add_argument("--category", metavar="FIELD", default="category", help="field with a row's category")
    parser.add_argument("--kind", choices=KINDS, help="what the lines are (default: told by their fields)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the bag-of-words baseline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    return parser.parse_args(argv)
