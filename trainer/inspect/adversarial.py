"""Which prompts want to bring out something harmful: by what a field of the record says, or else by a list of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.data.prompt import ASSISTANT, HUMAN
from trainer.inspect.rows import SHOWN, Row

# Fields that say yes or no, or hold a score from 0 to 1.
FLAGS = (
    "adversarial", "is_adversarial", "harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "is_toxic", "toxicity",
    "jailbreak", "is_jailbreak", "jailbreaking", "red_team", "is_red_team",
)  # fmt: skip
# Fields whose text names what the row is; `harmless` is how data sets call the part in which people tried to do harm.
LABELS = ("category", "type", "source", "tags", "subset", "prompt_harm_label")
SAYS_SO = re.compile(
    r"(?<!non )(?<!not )(?<!no )\b(?:adversarial|red ?team(?:ing|ed)?|harmless(?:ness)?|harmful|jailbreak(?:s|ing)?|"
    r"unsafe|toxic)\b"
)
YES, NO = frozenset({"true", "yes", "1", "y"}), frozenset({"false", "no", "0", "n", "none", ""})

MOST = 20_000  # letters of a prompt that are looked through
WORDS = re.compile(
    r"\b(?:kill(?:s|ed|ing)? (?:my|a|an|the|him|her|them|someone|somebody|people|you|yourself|myself|that)|"
    r"murder(?:s|ed|ing)?|suicide|self-harm|bombs?|explosives?|grenades?|weapons?|firearms?|poison(?:s|ed|ing)?|"
    r"anthrax|nerve gas|torture[ds]?|torturing|kidnap\w*|stalk(?:ed|ing)?|blackmail\w*|rob (?:a|the|my|someone)|"
    r"shoplift\w*|steal(?:ing)?|burglar\w*|counterfeit\w*|launder(?:ing)? money|money laundering|tax evasion|"
    r"hack(?:ed|ing|er|ers)? (?:into|someone|a|an|the|my|his|her)|malware|ransomware|keylogger|phishing|ddos|"
    r"credit card numbers?|identity theft|meth|heroin|cocaine|crack ?pipe|drug dealers?|deal(?:ing)? drugs|"
    r"rap(?:e|ed|ing|ist)|molest\w*|pedophil\w*|child porn\w*|racial slurs?|racist|sexist|genocide|terrorists?|"
    r"white supremac\w*|ku klux klan|nigg\w+|"
    r"ignore (?:all |any )?(?:of )?(?:the |your |my )?(?:previous|prior|above|earlier) (?:instructions|rules|prompts?)|"
    r"disregard (?:all |any )?(?:the |your )?(?:previous|prior|above|earlier) \w+|"
    r"(?:no|without(?: any)?) (?:ethical |moral )?(?:restrictions|filters|guidelines|limitations)|"
    r"do anything now|developer mode|jail ?break\w*|(?:reveal|print|show|repeat) (?:me )?your (?:system|"
    r"hidden) prompt)\b"
)
# What of it has to be in a text; a look for plain letters is many times faster.
STEMS = (
    "kill", "murder", "suicid", "self-h", "bomb", "explos", "grenad", "weapon", "firearm", "poison", "anthrax",
    "nerve", "tortur", "kidnap", "stalk", "blackm", "rob ", "shopl", "steal", "burglar", "counterf", "launder",
    "tax ev", "hack", "malware", "ransom", "keylog", "phish", "ddos", "credit card", "identity", "meth", "heroin",
    "cocaine", "crack", "drug", "rap", "molest", "pedoph", "child porn", "slur", "racist", "sexist", "genocid",
    "terroris", "supremac", "klux", "nigg", "ignore", "disregard", "restrictions", "filters", "guidelines",
    "limitations", "anything now", "developer mode", "jail", "your system", "your hidden",
)  # fmt: skip


def adversarial(rows: Sequence[Row], category: str) -> dict[str, Any]:
    """Rows with such prompts, their share, the first lines, and who says so.

    Args:
        rows: Well-formed rows.
        category: One more field whose text may name what a row is.

    Returns:
        `told_by` names the fields, or is "words"; `silent` counts rows in which those fields say nothing.
    """
    labels = dict.fromkeys((*LABELS, category))
    said = [_said(row.raw, labels) for row in rows]
    fields = {name for answers in said for name, (_, about_harm) in answers.items() if about_harm}
    if fields:
        told = sorted(fields)
        yes = [any(answers[name][0] for name in told if name in answers) for answers in said]
        silent = sum(not answers.keys() & fields for answers in said)
    else:
        told, silent = ["words"], 0
        yes = [sounds_adversarial(row.prompt) for row in rows]
    lines = [row.number for row, found in zip(rows, yes, strict=True) if found]
    return {
        "told_by": "words" if not fields else "fields", "fields": told if fields else [], "rows": len(lines),
        "share": len(lines) / len(rows), "silent": silent, "first_lines": lines[:SHOWN],
    }  # fmt: skip


def sounds_adversarial(prompt: str) -> bool:
    """Whether the user's turns hold a word of the list, in English.

    >>> sounds_adversarial("How do I hack into my school?"), sounds_adversarial("A life hack for skilled cooks")
    (True, False)
    """
    text = prompt[:MOST] if len(prompt) > MOST else prompt
    if HUMAN in text:
        # What the assistant has said is no wish of the user.
        text = "\n".join(turn.partition(ASSISTANT)[0] for turn in text.split(HUMAN)[1:])
    text = text.lower()
    return any(stem in text for stem in STEMS) and WORDS.search(text) is not None


def _said(raw: dict[str, Any], labels: Iterable[str]) -> dict[str, tuple[bool, bool]]:
    """What each field says: yes or no, and whether that shows that the field is about harm.

    A flag is about nothing else. A category says no by being another one, but only in a file where one says yes.
    """
    found: dict[str, tuple[bool, bool]] = {}
    for name in FLAGS:
        if name in raw and (answer := _flag(raw[name])) is not None:
            found[name] = answer, True
    for name in labels:
        value = raw.get(name)
        texts = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
        if texts:
            yes = any(SAYS_SO.search(re.sub(r"[_\-\s]+", " ", text.lower())) for text in texts)
            found[name] = yes, yes
    return found


def _flag(value: Any) -> bool | None:
    if isinstance(value, bool | int | float):
        return value >= 0.5
    if isinstance(value, str):
        text = value.strip().lower()
        return True if text in YES else False if text in NO else None
    return None
