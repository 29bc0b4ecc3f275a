"""From a seed to a verdict."""

from __future__ import annotations

from tests.fuzz import bad, headless, heads, losses
from tests.fuzz.draw import Case, Dice, dress
from tests.fuzz.judge import Fault, judge
from tests.fuzz.show import report

DRAWS = heads.DRAWS | losses.DRAWS | headless.DRAWS


def make(seed: int, function: str | None = None, about: str | None = None) -> Case:
    d = Dice(seed)
    name = d.pick(*DRAWS)
    case = Case(seed, function or name)
    DRAWS[case.function](d, case)
    case.positional = d.whole(0, 9)
    spoiled = d.chance(0.5) or about is not None
    dress(d, case, rubbish=not spoiled and d.chance(0.5))
    if spoiled:
        bad.spoil(d, case, about)
    return case


def trial(seed: int, function: str | None = None, about: str | None = None) -> tuple[str, str]:
    """("right", ""), ("refused", "") or ("fault", what to print)."""
    case = make(seed, function, about)
    try:
        return judge(case), ""
    except Fault as fault:
        return "fault", report(case, str(fault))
