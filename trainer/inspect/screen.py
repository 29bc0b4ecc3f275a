"""The facts of `inspect` as a person reads them: sections of 80 columns, and first of all what stands out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainer.base.console import plain_table
from trainer.base.statistics import Estimate

WIDTH = 80
MOST = 12  # rows of a table; the rest is in the JSON
Facts = Mapping[str, Any]


def screen(facts: Facts) -> str:
    """All sections, one under the other, no line longer than 80 columns."""
    parts = [_file(facts["file"])]
    parts += [_lengths(name, facts[name]) for name in ("words", "tokens") if name in facts]
    sections: dict[str, Callable[[Any], str]] = {
        "comparisons": _comparisons, "lists": _lists, "desirable": _desirable, "transcripts": _transcripts,
        "duplicates": _duplicates, "annotators": _annotators, "categories": _categories, "tasks": _tasks,
        "adversarial": _adversarial, "personal": _personal, "overlap": _overlap, "baselines": _baselines,
    }  # fmt: skip
    parts += [draw(facts[name]) for name, draw in sections.items() if name in facts]
    notes = facts["stands_out"] or ["Nothing that a training run would trip over."]
    parts.append("What stands out\n" + "\n".join(wrapped(note, "  * ") for note in notes))
    return "\n\n".join(part for part in parts if part)


def findings(facts: Facts) -> list[str]:
    """Sentences about what deserves a thought before anything is trained on this file."""
    rules = (_about_lines, _about_length, _about_people, _about_leaks, _about_privacy)
    return [text for rule in rules for text in rule(facts)]


def _about_lines(facts: Facts) -> Iterator[str]:
    file, twice = facts["file"], facts["duplicates"]
    if file["bad"]:
        share = file["bad"] / file["lines"]
        first = file["first_bad"][0]
        refusal = "; above 1 % no stage trains" if share > 0.01 else ""
        yield f"{file['bad']} bad lines ({share:.1%}){refusal}. The first is line {first['line']}: {first['reason']}."
    for reason, count in file["left_out"].items():
        yield f"{count} rows teach nothing and are left out of training: {reason}."
    if markup := facts.get("markup"):
        yield (
            f"{markup['prompts']} prompts hold special tokens of {markup['model']}, first in line {markup['line']}. "
            "Where they were rendered before, train with --prompt-format raw; otherwise these lines are bad."
        )
    if twice["rows"]:
        yield f"{twice['rows']} rows occur more than once."
    if twice["contradictions"]:
        yield f"{twice['contradictions']} pairs are preferred one way in one row and the other way in another."


def _about_length(facts: Facts) -> Iterator[str]:
    longer = facts.get("comparisons", {}).get("chosen_longer")
    base = facts.get("baselines", {})
    if longer is not None and not longer.low <= 0.5 <= longer.high:
        habit = "longer" if longer.value > 0.5 else "shorter"
        yield (
            f"The {habit} reply is preferred more often than not ({_side(longer):.0%}). A reward model can learn that "
            "alone, and PPO will then follow it: watch the length."
        )
    words, length = base.get("bag_of_words"), base.get("longer_reply")
    if words is not None and length is not None and words.value <= _side(length):
        yield "Single words say no more about these preferences than length does."
    places = facts.get("lists", {}).get("best_at_position")
    if places and max(places) > 1.5 / len(places):
        best = places.index(max(places)) + 1
        yield f"The best reply stands at place {best} in {max(places):.0%} of the lists; shuffle before training."


def _about_people(facts: Facts) -> Iterator[str]:
    people = facts.get("annotators")
    if people is None:
        return
    if (agreed := people["agreement"]) is not None and agreed.alpha.high < 0.4:
        yield (
            f"Annotators agree little beyond chance (alpha {agreed.alpha.value:.2f}). Better instructions come before "
            "a better model."
        )
    for name, share in people["gold"].items():
        if share.high < 0.7:
            yield f"{name} answers only {share.value:.0%} of the gold questions right."


def _about_leaks(facts: Facts) -> Iterator[str]:
    leak = facts.get("overlap")
    if leak and leak["same_prompt"]:
        share = leak["same_prompt"] / leak["held_out"]
        yield f"{leak['same_prompt']} held-out prompts ({share:.1%}) are trained on: the evaluation is not held out."


def _about_privacy(facts: Facts) -> Iterator[str]:
    if facts["personal"]:
        counts = {kind: one["prompts"]["found"] + one["replies"]["found"] for kind, one in facts["personal"].items()}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        yield f"Personal data: {told}. A model can learn them by heart; take them out or replace them first."


def _file(file: Facts) -> str:
    rows = [("file", file["path"]), ("sha256", file["sha256"]), ("kind", file["kind"])]
    rows += [("lines", f"{file['lines']}, of which {file['bad']} bad")]
    rows += [("left out", f"{count} with {reason}") for reason, count in file["left_out"].items()]
    rows += [(f"line {bad['line']}", bad["reason"]) for bad in file["first_bad"]]
    width = max(len(name) for name, _ in rows)
    lines = [wrapped(str(value), f"  {name.ljust(width)}  ") for name, value in rows]
    return "\n".join(["Data", *lines])


def _lengths(unit: str, facts: Facts) -> str:
    rows = [("", "mean", "median", "p95", "max")]
    rows += [(name, f"{x['mean']:.1f}", f"{x['median']:g}", f"{x['p95']}", f"{x['max']}") for name, x in facts.items()]
    return _table(f"Length in {unit}", rows)


def _comparisons(facts: Facts) -> str:
    rows = [("pairs", str(facts["pairs"]))]
    if facts["chosen_longer"] is not None:
        rows += [("chosen is longer", _share(facts["chosen_longer"])), ("equally long", f"{facts['equal_length']:.1%}")]
    rows += [("ties", f"{facts['ties']} ({facts['ties_share']:.1%})")]
    rows += [("rows with identical replies", str(facts["identical_replies"]))]
    return _table("Preferences", [*rows, ("empty replies", str(facts["empty_replies"]))])


def _lists(facts: Facts) -> str:
    if "best_at_position" not in facts:
        return ""
    sizes = ", ".join(f"{size}: {count}" for size, count in facts["sizes"].items())
    places = "  ".join(f"{share:.0%}" for share in facts["best_at_position"][:MOST])
    rows = [("lists by size", sizes), ("all replies tied", str(facts["all_tied"])), ("best reply at place", places)]
    return _table("Ranked lists", rows)


def _desirable(share: Estimate) -> str:
    return _table("Labels", [("desirable", _share(share))])


def _transcripts(facts: Facts) -> str:
    first, rest = list(facts["human_turns"].items())[:5], list(facts["human_turns"].values())[5:]
    turns = ", ".join([f"{n}: {count}" for n, count in first] + ([f"more: {sum(rest)}"] if rest else []))
    rows = [("transcripts", str(facts["transcripts"])), ("human turns", turns)]
    return _table("Dialogues", [*rows, ("replies with further turns", str(facts["replies_with_more_turns"]))])


def _duplicates(facts: Facts) -> str:
    rows = [("rows", str(facts["rows"])), ("prompts", str(facts["prompts"]))]
    return _table("Occurring again", [*rows, ("pairs preferred both ways", str(facts["contradictions"]))])


def _annotators(facts: Facts) -> str:
    parts = []
    if (agreed := facts["agreement"]) is not None:
        rows = [
            ("pairs with several labels", f"{agreed.pairs}, {agreed.judgments} labels"),
            ("agreement", f"{agreed.observed:.1%}, by chance {agreed.expected:.1%}"),
            ("Krippendorff's alpha (nominal)", str(agreed.alpha)),
        ]
        parts.append(_table("Annotators", rows))
    people: list[tuple[str, ...]] = [("", "labels", "with the others", "gold questions")]
    for name, count in list(facts["judgments"].items())[:MOST]:
        met, gold = facts["with_others"].get(name), facts["gold"].get(name)
        people.append((name[:24], str(count), _share(met) if met else "-", _share(gold) if gold else "-"))
    more = len(facts["judgments"]) - MOST
    people += [(f"and {more} more",)] if more > 0 else []
    return "\n\n".join([*parts, _table("Each annotator", people)])


def _categories(facts: Sequence[Facts]) -> str:
    rows = [("", "rows", "share", "chosen is longer")]
    for one in facts[:MOST]:
        longer = one["chosen_longer"]
        rows.append((one["name"][:30], str(one["rows"]), f"{one['share']:.1%}", _share(longer) if longer else ""))
    more = len(facts) - MOST
    return _table("Categories", rows + ([(f"and {more} more",)] if more > 0 else []))


def _tasks(facts: Sequence[Facts]) -> str:
    rows = [(one["name"], str(one["rows"]), f"{one['share']:.1%}") for one in facts]
    return _table("Kinds of task (by English rules)", [("", "rows", "share"), *rows])


def _adversarial(facts: Facts) -> str:
    fields = facts["fields"]
    who = f"the field{'s' * (len(fields) > 1)} {', '.join(fields)}" if fields else "a list of English words"
    rows = [("adversarial", f"{facts['rows']} ({facts['share']:.1%})"), ("told by", who)]
    rows += [("rows that do not say", str(facts["silent"]))] if facts["silent"] else []
    return _table("Adversarial prompts", rows + _first_lines(facts["first_lines"]))


def _personal(facts: Facts) -> str:
    if not facts:
        return _table("Personal data", [("found", "none")])
    rows = [("", "", "found", "first lines")]
    for kind, one in facts.items():
        places = [(where, one[where]) for where in ("prompts", "replies") if one[where]["found"]]
        for i, (where, place) in enumerate(places):
            lines = ", ".join(map(str, place["first_lines"]))
            rows.append((kind if i == 0 else "", where, str(place["found"]), lines))
        rows.append(("", "such as", "", ", ".join(one["examples"][:2])))
    return _table("Personal data", rows)


def _first_lines(numbers: Sequence[int]) -> list[tuple[str, ...]]:
    return [("first lines", ", ".join(map(str, numbers)))] if numbers else []


def _overlap(facts: Facts) -> str:
    rows = [("held-out prompts", str(facts["held_out"])), ("the same in training", str(facts["same_prompt"]))]
    return _table("Held out", [*rows, ("13 words in a row in training", str(facts["shared_words"]))])


def _baselines(facts: Facts) -> str:
    rows = [("the longer reply", _share(facts["longer_reply"]))]
    if facts["bag_of_words"] is not None:
        rows.append(("bag of words, held out", _share(facts["bag_of_words"])))
    return _table("Pair accuracy to beat", rows)


def _share(x: Estimate) -> str:
    return f"{x.value:.1%} [{x.low:.1%}, {x.high:.1%}]"


def _side(longer: Estimate) -> float:
    """Accuracy of the better of "longer wins" and "shorter wins"."""
    return max(longer.value, 1 - longer.value)


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(line[:WIDTH] for line in plain_table(title, rows).split("\n"))


def wrapped(text: str, lead: str) -> str:
    """A paragraph of at most 80 columns behind `lead`."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=True
    )
