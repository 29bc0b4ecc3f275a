r"""The reward ``exact_answer``, and what a number in a text is.

The same rules hold for replies and for the field ``answer``:

* The last number counts, whatever stands around it: ``\boxed{5}``, ``**5**``, ``$5``, ``50%`` and ``x2`` hold 5, 5, 5,
  50 and 2. Units, currencies and percent signs are not looked at.
* A minus is that of the keyboard, the real one (U+2212), a fullwidth one or an en dash, right before the number or its
  currency. Behind a letter, a digit, a point, a closing bracket or another minus it is a hyphen, a range or a
  subtraction: ``3-5``, ``COVID-19`` and ``(a)-5`` hold no negative number, ``x = -5`` does.
* A point is a decimal point, also without digits before it (``.5``), unless it stands behind a letter, a bracket or
  another point. A comma parts thousands where three digits follow each (``1,000``, and LaTeX's ``1{,}000`` and
  ``1,\!000``); every other comma parts numbers, so ``1, 2, 3`` ends in 3, ``1,5`` in 5 and ``1,00`` in 0.
* ``1e-5``, ``1.5E3``, ``10^3`` and ``1.5 \times 10^{3}`` are one number each. Other powers are not calculated, and an
  exponent alone is no number: ``25 m^2`` holds 25. Superscript digits are not read.
* ``3/4`` and ``\frac{3}{4}`` are one number each, equal to 0.75; the date ``3/4/2024`` is three numbers.
* Infinity and "not a number" are none, nor are true and false.

Two numbers are equal where they are so exactly: nothing is rounded, however many digits there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

Number = Decimal | Fraction

MINUS = r"\-\u2212\uff0d\ufe63\u2013"
EXPONENT = rf"[+{MINUS}]?\d{{1,9}}"
TO_THE = r"\^\{?(?P<NAME>" + EXPONENT + r")(?!\d)\}?"
NUMBER = re.compile(
    rf"(?=[\d\\^.+$€£¥₹{MINUS}])(?:"  # at most other characters there is nothing to try
    rf"(?P<exponent>\^\{{?{EXPONENT})"
    rf"|(?P<sign>(?<![{MINUS}\w.)\]}}%])[+{MINUS}])?(?:\\?[$€£¥₹])?(?:"
    r"\\[dt]?frac\{(?P<over>\d{1,18})\}\{(?P<under>0{0,9}[1-9]\d{0,17})\}"
    r"|(?<![\d./])(?P<before>\d{1,18})/(?P<behind>0{0,9}[1-9]\d{0,17})(?![\d/]|\.\d)"
    rf"|10{TO_THE.replace('NAME', 'ten')}"
    r"|(?P<digits>\d{1,3}(?:(?:,\\!|\{,\}|,)\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.)\]}])\.\d+)"
    rf"(?:[eE](?P<e>{EXPONENT})(?!\w)|\s?(?:[×·*]|\\times|\\cdot)\s?10{TO_THE.replace('NAME', 'times')})?"
    r"))"
)


def exact_answer(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    r"""1 where the last number of the response is that of the record's ``answer``, else 0.

    What a number is, the beginning of this file says. In an ``answer`` with ``####``, only what follows it counts; an
    ``answer`` may also be a number.

    Example:
        >>> exact_answer(["2 + 2?"], ["It is 4."], [{"answer": "2 + 2 = 4\n#### 4"}])
        [1.0]
        >>> exact_answer(["half of 1?", "1 - 6?"], ["it is .50", "3-5"], [{"answer": "1/2"}, {"answer": -5}])
        [1.0, 0.0]
    """
    wanted = [number_of(extra.get("answer")) for extra in extras]
    said = [last_number(response) for response in responses]
    return [float(x is not None and x == y) for x, y in zip(said, wanted, strict=True)]


exact_answer.fields = ("answer",)  # type: ignore[attr-defined]  trainer.rewards.fields looks for it


def number_of(answer: Any) -> Number | None:
    """What the field ``answer`` of a record has for a number; None if it has none.

    >>> number_of(1e-5) == number_of("0.00001"), number_of("3 apples and 4 #### 7"), number_of(True), number_of("Paris")
    (True, Decimal('7'), None, None)
    """
    if isinstance(answer, str):
        return last_number(answer.rsplit("####", 1)[-1])
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        return None
    number = Decimal(repr(answer)) if isinstance(answer, float) else Decimal(answer)
    return number if number.is_finite() else None


def last_number(text: str) -> Number | None:
    r"""The last number of a text.

    >>> [str(last_number(text)) for text in ("so x = \u22125", "3-5", "5-year", "-$1,000.50", "1, 2, 3", "nothing")]
    ['-5', '5', '5', '-1000.50', '3', 'None']
    >>> [str(last_number(text)) for text in (r"\boxed{.5}", "10^3", "1.5E3", "25 m^2", r"\frac{3}{4}", "50%", "4.")]
    ['0.5', '1E+3', '1.5E+3', '25', '3/4', '50', '4']
    """
    found = None
    for match in NUMBER.finditer(text):
        if match["exponent"] is None:
            found = match
    return None if found is None else _value(found)


def is_number(text: str) -> bool:
    """Whether a text is a number and nothing else, but for a currency, a percent sign or a full stop.

    >>> is_number("-1,000."), is_number("50%"), is_number("5 km"), is_number("nan")
    (True, True, False, False)
    """
    match = NUMBER.fullmatch(text.strip().rstrip(".%$").lstrip("$"))
    return match is not None and match["exponent"] is None


def _value(match: re.Match[str]) -> Number:
    sign = "-" if match["sign"] not in (None, "+") else ""
    if (top := match["over"] or match["before"]) is not None:
        return Fraction(int(sign + top), int(match["under"] or match["behind"]))
    digits = re.sub(r"[^\d.]", "", match["digits"] or "1")
    exponent = match["ten"] or match["e"] or match["times"] or "0"
    return Decimal(f"{sign}{digits}e{re.sub(f'[{MINUS}]', '-', exponent)}")
