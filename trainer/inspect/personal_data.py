"""Personal data in prompts and replies: mail addresses, telephone numbers, payment cards, IBANs, US social security
numbers. Counted, with the numbers of their lines; what is shown of them is masked.

A number counts only in a form that hardly anything else has: a sum, a date, a price or an id is none of these. The
patterns have bounds, so that time grows with the length of a text and no faster.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.inspect.rows import SHOWN, Row

KINDS = ("mail addresses", "telephone numbers", "payment cards", "IBANs", "US SSNs")
MAIL, PHONE, CARD, IBAN, SSN = KINDS
EXAMPLES = 3

IN_LOCAL = frozenset(string.ascii_letters + string.digits + "._%+-")
LOCAL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?\Z")
DOMAIN = re.compile(r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6})([A-Za-z]{2,24})(?![A-Za-z0-9-])")
# RFC 2606 keeps these for examples: nobody has such an address.
RESERVED_ENDS = frozenset({"test", "example", "invalid", "localhost"})
RESERVED = re.compile(r"(?:^|\.)example\.(?:com|net|org)$")
FILES = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "py", "java", "html", "json", "md"})

# A run of nine digits or more is in all of the numbers below but a short IBAN's; most texts have none.
DIGITS = re.compile(r"\d(?:[ ().\-/]{0,3}\d){8}")
# Neither part of a word nor of a larger number or a sum; a dash or a star with a blank may begin the line of a list.
BEFORE = r"(?<![\w+*/=<^$€£-])(?<!\d[.,])(?<![=+^<$€£] )"
AFTER = r"(?![\w*/=>^%])(?![.\-+]\d)(?!,\d{3}\b)(?! [=*+^<>])"
INTERNATIONAL = re.compile(BEFORE + r"\+[1-9]\d{0,3}(?:[ .\-/]?\(?\d{1,5}\)?){1,6}" + AFTER)
NORTH_AMERICAN = re.compile(
    BEFORE + r"(?:1[ .-])?(?:\(([2-9]\d\d)\) ?|([2-9]\d\d)([ .-]))([2-9]\d\d)([ .-])(\d{4})" + AFTER
)
NATIONAL = re.compile(BEFORE + r"\(?0\d{1,5}\)?[ /-]\d{2,8}(?:[ -]\d{2,6}){0,3}" + AFTER)
CALLED = re.compile(r"(?:tel(?:efon|ephone)?|phone|call|mobile?|handy|cell|fax|text|whatsapp|number|reach)\W.{0,20}\Z")
CARDS = re.compile(BEFORE + r"(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|\d{4}([ -]?)\d{6}\2\d{4,5}|\d{19})" + AFTER)
ISSUERS = re.compile(
    r"4\d{15}(?:\d{3})?|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3[068]\d{12}|"
    r"(?:6011|65\d\d|64[4-9]\d)\d{12}|35\d{14}|62\d{14}(?:\d{3})?"
)
IBANS = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
SSNS = re.compile(BEFORE + r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}" + AFTER)
# How long the IBANs of a country are.
LENGTHS = {
    "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24, "FI": 18,
    "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SA": 24, "SE": 24, "SI": 19,
    "SK": 24, "TR": 26, "AE": 23, "UA": 29,
}  # fmt: skip


def personal(rows: Sequence[Row]) -> dict[str, Any]:
    """For each kind that occurs: how many in prompts and in replies, the first lines, and masked examples.

    Args:
        rows: Well-formed rows.
    """
    found: dict[str, Any] = {}
    for row in rows:
        for where, texts in (("prompts", (row.prompt,)), ("replies", row.responses)):
            for kind, text in itertools.chain.from_iterable(map(find, texts)):
                one = found.setdefault(kind, {"prompts": _none(), "replies": _none(), "examples": []})
                place, shown = one[where], masked(kind, text)
                place["found"] += 1
                if row.number not in place["first_lines"] and len(place["first_lines"]) < SHOWN:
                    place["first_lines"].append(row.number)
                if shown not in one["examples"] and len(one["examples"]) < EXAMPLES:
                    one["examples"].append(shown)
    return {kind: found[kind] for kind in KINDS if kind in found}


def find(text: str) -> Iterator[tuple[str, str]]:
    """Kind and wording of everything personal in a text; a digit belongs to one find.

    >>> list(find("Mail jane.doe@mail.net or call (415) 555-2671, not 555-1234, by 2024-01-15."))
    [('mail addresses', 'jane.doe@mail.net'), ('telephone numbers', '(415) 555-2671')]
    """
    if "@" in text:
        yield from ((MAIL, address) for address in _addresses(text))
    if not DIGITS.search(text):
        return
    taken: set[int] = set()
    searches = (IBAN, _ibans(text)), (CARD, _cards(text)), (SSN, SSNS.finditer(text)), (PHONE, _phones(text))
    for kind, matches in searches:
        for match in matches:
            if taken.isdisjoint(places := range(*match.span())):
                taken.update(places)
                yield kind, match[0]


def masked(kind: str, text: str) -> str:
    """What may be shown: the form, and no more than the first letters of an address or the last digits of a number.

    >>> masked(MAIL, "jane.doe@mail.net"), masked(PHONE, "(415) 555-2671")
    ('j***@m***.net', '(***) ***-**71')
    """
    if kind == MAIL:
        local, _, domain = text.partition("@")
        return f"{local[0]}***@{domain[0]}***.{domain.rpartition('.')[2]}"
    return re.sub(r"[A-Za-z0-9]", "*", text[:-2]) + text[-2:]


def _none() -> dict[str, Any]:
    return {"found": 0, "first_lines": []}


def _addresses(text: str) -> Iterator[str]:
    """Outwards from every @, so that a long text without one costs nothing."""
    for domain in DOMAIN.finditer(text):
        at = domain.start()
        # Backwards over what an address may hold; then what is there has to begin and end like one.
        start = at
        while start > max(0, at - 64) and text[start - 1] in IN_LOCAL:
            start -= 1
        local = LOCAL.match(text[start:at].lstrip("._%+-"))
        name, end = domain[1][:-1].lower(), domain[2].lower()
        if local is None or end in RESERVED_ENDS | FILES or RESERVED.search(f"{name}.{end}"):
            continue
        if text[max(0, start - 1) : start] in (":", "/") and "://" in text[max(0, start - 100) : start]:
            continue  # the password of an address of the web, not a mail address
        if local[0] != "git":  # as in git@github.com:owner/name
            yield local[0] + domain[0]


def _phones(text: str) -> Iterator[re.Match[str]]:
    for match in INTERNATIONAL.finditer(text):
        digits = sum(c.isdigit() for c in match[0])
        plain = match[0][1:].isdigit()
        decimal = re.fullmatch(r"\+\d+\.\d+", match[0])
        if not decimal and (10 if plain else 9) <= digits <= 15:
            yield match
    for match in NORTH_AMERICAN.finditer(text):
        _, area, first, exchange, second, line = match.groups()
        fiction = exchange == "555" and line.startswith("01")  # 555-0100 to 555-0199 are kept for films
        blanks = first == second == " "  # three numbers in a row look the same
        if not fiction and (area is None or first == second) and (not blanks or _is_called(text, match)):
            yield match
    for match in NATIONAL.finditer(text):
        if 9 <= sum(c.isdigit() for c in match[0]) <= 12 and _is_called(text, match):
            yield match


def _is_called(text: str, match: re.Match[str]) -> bool:
    """Whether a word before it says that it is a number to call."""
    return CALLED.search(text[max(0, match.start() - 40) : match.start()].lower()) is not None


def _cards(text: str) -> Iterator[re.Match[str]]:
    for match in CARDS.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if ISSUERS.fullmatch(digits) and _luhn(digits):
            yield match


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right is doubled."""
    doubled = [sum(divmod(2 * int(d), 10)) if i % 2 else int(d) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _ibans(text: str) -> Iterator[re.Match[str]]:
    """ISO 13616: with the first four letters at the end, and A as 10, the number is one more than a multiple of 97."""
    for match in IBANS.finditer(text):
        code = match[0].replace(" ", "")
        number = "".join(str(int(c, 36)) for c in code[4:] + code[:4])
        if len(code) == LENGTHS.get(code[:2]) and int(number) % 97 == 1:
            yield match
