"""The numbers of `rlhf-train inspect`: one small function per section, each giving plain JSON values."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trainer.base.statistics import Estimate, proportion
from trainer.data.prompt import ASSISTANT, HUMAN
from trainer.inspect import agreement as agree
from trainer.inspect.baselines import Pair, bag_of_words, length_baseline, share_over_prompts
from trainer.inspect.rows import Contents, Row, judgments

Facts = dict[str, Any]
SHARED_WORDS = 13  # as in the contamination study of Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C
NO_CATEGORY = "(none)"


def lengths(rows: Sequence[Row], count: Callable[[Sequence[str]], list[int]]) -> Facts:
    """Mean, median, 95th percentile and longest, of prompts and of replies by what became of them.

    Args:
        rows: Well-formed rows.
        count: Lengths of texts, in whatever unit.
    """
    texts = {"prompt": [r.prompt for r in rows]}
    for row in rows:
        if row.ranks:
            best, worst = min(row.ranks), max(row.ranks)
            for text, rank in zip(row.responses, row.ranks, strict=True):
                pair = len(row.ranks) == 2
                name = ("chosen" if rank == best else "rejected") if pair else "best" if rank == best else "other"
                texts.setdefault("tied" if best == worst else name, []).append(text)
        else:
            for text in row.responses:
                texts.setdefault("response", []).append(text)
    return {name: _spread(count(found)) for name, found in texts.items() if found}


def _spread(values: Sequence[int]) -> Facts:
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(ordered), "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], "max": ordered[-1],
    }  # fmt: skip


def comparisons(rows: Sequence[Row]) -> Facts:
    """Pairs, the side that is longer, ties, and replies that are empty or the same."""
    made = [(row.prompt, *pair) for row in rows for pair in row.pairs()]
    longer = [_sign(len(better.split()) - len(worse.split())) for _, better, worse in made]
    possible = sum(len(r.ranks) * (len(r.ranks) - 1) // 2 for r in rows)
    return {
        "pairs": len(made),
        "chosen_longer": share_over_prompts([float(x > 0) for x in longer], [p for p, *_ in made]) if made else None,
        "equal_length": longer.count(0) / max(len(made), 1),
        "ties": possible - len(made),
        "ties_share": (possible - len(made)) / max(possible, 1),
        "identical_replies": sum(len(set(r.responses)) < len(r.responses) for r in rows),
        "empty_replies": sum(not text.strip() for r in rows for text in r.responses),
    }


def lists(rows: Sequence[Row]) -> Facts:
    """Sizes of ranked lists, and where the best reply stands: that it stands first too often is a habit of judges."""
    sizes = Counter(len(r.ranks) for r in rows)
    fair = [r for r in rows if len(set(r.ranks)) > 1]
    width = max(sizes)
    if set(sizes) == {2} and all("chosen" in r.raw for r in rows):
        return {"sizes": dict(sizes)}
    best: list[float] = [0.0] * width
    for row in fair:
        top = [i for i, rank in enumerate(row.ranks) if rank == min(row.ranks)]
        for i in top:
            best[i] += 1 / len(top)
    shares = [count / max(len(fair), 1) for count in best]
    return {"sizes": dict(sorted(sizes.items())), "all_tied": len(rows) - len(fair), "best_at_position": shares}


def duplicates(rows: Sequence[Row]) -> Facts:
    """Rows that occur again, prompts that do, and pairs that were preferred both ways."""
    whole = Counter((r.prompt, tuple(r.responses), tuple(r.ranks), _who(r)) for r in rows)
    prompts = Counter(r.prompt for r in rows)
    ways = {(r.prompt, *pair) for r in rows for pair in r.pairs() if pair[0] != pair[1]}
    both = sum((prompt, worse, better) in ways for prompt, better, worse in ways) // 2
    return {
        "rows": sum(whole.values()) - len(whole), "prompts": sum(prompts.values()) - len(prompts),
        "contradictions": both,
    }  # fmt: skip


def _who(row: Row) -> str:
    """Two annotators may say the same about one pair: that is agreement, not a duplicate."""
    return repr([judgment.annotator for judgment in judgments(row)])


def annotators(rows: Sequence[Row]) -> Facts | None:
    """Agreement and gold accuracy, or None if no row says who judged it."""
    said = [judgment for row in rows for judgment in judgments(row)]
    if not said:
        return None
    return {
        "judgments": dict(Counter(j.annotator for j in said).most_common()),
        "agreement": agree.agreement(said),
        "with_others": agree.with_others(said),
        "gold": agree.gold_accuracy(said),
    }


def categories(rows: Sequence[Row], name: str) -> list[Facts] | None:
    """Rows and chosen-longer per value of a field, most frequent first; None if no row has it."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        value = row.raw.get(name)
        for label in value if isinstance(value, list) else [value]:
            groups.setdefault(NO_CATEGORY if label is None else str(label), []).append(row)
    if set(groups) <= {NO_CATEGORY}:
        return None
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {"name": label, "rows": len(own), "share": len(own) / len(rows)}
        | {"chosen_longer": comparisons(own)["chosen_longer"]}
        for label, own in ordered
    ]


def transcripts(rows: Sequence[Row]) -> Facts | None:
    r"""Turns of `\n\nHuman:` transcripts, and how many pairs part before their last reply; None if there are none."""
    told = [r for r in rows if r.prompt.startswith(HUMAN) and r.prompt.endswith(ASSISTANT)]
    if not told:
        return None
    turns = Counter(r.prompt.count(HUMAN) for r in told)
    return {
        "transcripts": len(told), "human_turns": dict(sorted(turns.items())),
        "replies_with_more_turns": sum(any(HUMAN in text for text in r.responses) for r in told),
    }  # fmt: skip


def labels(rows: Sequence[Row]) -> Estimate:
    """Share of desirable replies."""
    return proportion(sum(bool(r.raw["label"]) for r in rows), len(rows))


def overlap(rows: Sequence[Row], held_out: Contents) -> Facts:
    """Held-out prompts that were trained on, word for word or in 13 words in a row."""
    prompts = {_plain(r.prompt) for r in rows}
    runs = {run for r in rows for run in _runs(r.prompt)}
    theirs = [r.prompt for r in held_out.rows]
    same = [_plain(prompt) in prompts for prompt in theirs]
    near = [bool(runs & _runs(prompt)) for prompt in theirs]
    return {
        "held_out": len(theirs), "same_prompt": sum(same),
        "shared_words": sum(n and not s for n, s in zip(near, same, strict=True)),
    }  # fmt: skip


def baselines(rows: Sequence[Row]) -> Facts | None:
    """Pair accuracies that cost nothing; None if there is nothing to compare."""
    pairs = [Pair(r.prompt, *pair) for r in rows if not r.left_out for pair in r.pairs()]
    if not pairs:
        return None
    enough = len({p.prompt for p in pairs}) >= 50
    return {"longer_reply": length_baseline(pairs), "bag_of_words": bag_of_words(pairs) if enough else None}


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _plain(text).split()
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)
