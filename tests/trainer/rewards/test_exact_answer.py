"""What a number is, in replies and in the field `answer`, for the reward exact_answer and for the tasks of eval."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from trainer.rewards.exact_answer import exact_answer, is_number, last_number, number_of
from trainer.rewards.names import BUILT_IN

MINUS, FULLWIDTH, EN_DASH = "\u2212", "\uff0d", "\u2013"
READ: dict[str, Any] = {
    # signs
    f"the sum is {MINUS}12": -12, f"the sum is {FULLWIDTH}12": -12, f"the sum is {EN_DASH}12": -12, "Answer:-12": -12,
    "(-12)": -12, "+12": 12, f"-12 or {MINUS}13": -13, "$-12$": -12, r"\boxed{-12}": -12, "x -12": -12,
    # hyphens, ranges and subtractions
    "between 10-12": 12, f"between 10{EN_DASH}12": 12, f"10{MINUS}12": 12, "GPT-4": 4, "a 12-year-old": 12,
    "20 - 12": 12,
    "(20)-12": 12, "10%-12%": 12, "$10-$12": 12, "see --12": 12, "f(x)-12": 12, "vol.-12": 12,
    # points
    "it is .25": "0.25", "it is -.25": "-0.25", "it is $.25": "0.25", "it is 12.": 12, "it is 12.50.": "12.5",
    "Fig.25": 25,
    "so...25": 25, "(a).25": 25, "version 1.2.25": 25, "12.0": 12,
    # commas
    "12,345": 12345, "-1,234,567.5": "-1234567.5", "7, 8, 9": 9, "7,8,9": 9, "1,00": 0, "1,5": 5, "1,2345": 2345,
    "1234,567": 567, "1{,}234": 1234, r"1,\!234": 1234, "1,234,": 1234,
    # exponents and powers
    "2e-3": "0.002", "2.5E4": 25000, f"2e{MINUS}3": "0.002", "3e+2": 300, "10^4": 10000, "-10^{-2}": "-0.01",
    r"2.5 \times 10^{4}": 25000, "2.5 × 10^4": 25000, "2*10^4": 20000, "25 m^3": 25, "7 x^{2}": 7, "2^10": 2, "2e": 2,
    # fractions
    "1/3": Fraction(1, 3), "-6/8": "-0.75", r"\frac{1}{3}": Fraction(1, 3), r"-\dfrac{3}{4}": "-0.75",
    "9/11/2001": 2001,
    "6/3": 2, "1/2.5": "2.5",
    # what surrounds them
    r"\boxed{12}": 12, "#### 12": 12, "**12**": 12, "€12": 12, "-$12": -12, r"-\$12": -12, "12 %": 12, "12km": 12,
    "H2O": 2,
    "１２": 12,
    # none
    "": None, "twelve": None, "NaN": None, "-inf": None, "Infinity": None, "x^2": None, "-.": None, "²": None,
}  # fmt: skip


@pytest.mark.parametrize("text", list(READ))
def test_the_last_number_of_a_text(text: str) -> None:
    want = READ[text]
    assert last_number(text) == (Decimal(want) if isinstance(want, str) else want)
    assert last_number(f"First 99, then 98: {text}") == (98 if want is None else last_number(text))


BIG = 2**64 + 1
FIELDS: list[tuple[Any, str, float]] = [
    (2e-7, "0.0000002", 1), (3e20, "3" + "0" * 20, 1), (0.1, "0.1", 1), (0.1, "0.10000000000000001", 0), (7.0, "7", 1),
    (BIG, str(BIG), 1), (BIG, str(BIG - 1), 0), (str(BIG), f"{BIG - 1}.0", 0), (10**400, "1" + "0" * 400, 1),
    (-3, f"{MINUS}3", 1), (Decimal("1.50"), "3/2", 1), ("3/2", "1.5", 1), ("3/2", "2", 0), ("1/3", "0.333", 0),
    ("It took 3 steps.\n#### 1,200", "1200 dollars", 1), ("It took 3 steps.\n#### twelve", "3", 0),
    (True, "1", 0), (False, "0", 0), (None, "0", 0), ([7], "7", 0), (float("nan"), "nan", 0),
    (float("inf"), "1e999", 0),
    ("NaN", "NaN", 0), ("1e999999999", "1", 0), ("1e999999999", "10e999999998", 1), ("1e999999999", "1/3", 0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reply", "reward"), FIELDS, ids=lambda x: repr(x)[:20])
def test_a_reward_for_an_answer_of_any_type(answer: Any, reply: str, reward: float) -> None:
    """Floats are what Python prints for them, integers are exact, and what is no number earns nothing."""
    assert exact_answer([""], [f"It is {reply}"], [{"answer": answer}]) == [reward]


def test_a_record_without_an_answer_earns_nothing() -> None:
    assert BUILT_IN["exact_answer"](["", ""], ["0", "5"], [{}, {"answer": 5}]) == [0.0, 1.0]
    assert number_of("#### ") is None


@pytest.mark.parametrize("text", ["4 apples", "1, 2", "^2", "", "."])
def test_more_than_a_number_is_none(text: str) -> None:
    assert not is_number(text)


REPEATED = [
    "9", "1,", ",000", "1/", "1/0000", "-", "-5", "^", "10^", "10^{", r"\frac{", r"\frac{1}{", "1e", "1e1234567890",
    ".",
    "1.", "1*10", r"1 \times ", "$", "1{,}", r"1,\!", " ",
]  # fmt: skip


def test_a_long_reply_takes_time_in_proportion() -> None:
    """Four times the length may take up to ten times as long, and a megabyte not many seconds, whatever is repeated."""

    def seconds(length: int) -> float:
        began = time.perf_counter()
        for piece in REPEATED:
            last_number("1" + piece * (length // len(piece)))
        return time.perf_counter() - began

    short = min(seconds(1 << 14) for _ in range(3))
    assert seconds(1 << 16) < 10 * short
    began = time.perf_counter()
    assert last_number("9" * (1 << 20)) == last_number("1, 7. " * (1 << 17) + "9" * (1 << 20))
    assert time.perf_counter() - began < 20
