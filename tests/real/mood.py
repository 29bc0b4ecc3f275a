"""How glad a reply sounds, from a list of words: a reward that everybody can judge, for runs with a real model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

GLAD_WORDS = """
adore amazing appreciate beautiful beauty best bliss brilliant calm charm charming cheerful comfort comforting cozy
delicious delight delightful ease easy elegant enchanting energy enjoy enjoyable enjoyed enjoying excellent excited
exciting fantastic fascinating favorite free freedom fresh friendly fun gentle glad good gorgeous grateful great
happiness happy harmony healthy helpful hope inspiring interesting joy joyful kind laugh like love loved lovely
loving magic magical marvelous nice passion peace peaceful perfect pleasant pleasure popular pretty proud pure
refreshing relax relaxing remarkable rewarding rich safe satisfying smile soothing special splendid strong stunning
success superb sweet tasty thank thrilling treasure unique vibrant warm warmth welcome wonder wonderful worth
"""
SAD_WORDS = """
afraid alone angry annoying anxiety awful bad bitter bored boring cold concern concerned cruel damage danger
dangerous dark dead death depressing difficult dirty disappointing disaster disease disgusting dislike dread dreary
dull evil fail failure fear fearful frightening frustrating gloomy grim hard harm harmful harsh hate horrible hurt
ill lack lonely lose loss lost mess miserable nasty negative never nightmare noisy pain painful poor problem
problems risk risky sad scared scary sick stress stressful struggle suffer terrible threat tired tough toxic
trouble ugly unhappy unhealthy unpleasant upset weak worried worry worse worst wrong
"""
GLAD, SAD = frozenset(GLAD_WORDS.split()), frozenset(SAD_WORDS.split())
NOT = frozenset({"not", "no", "without", "isn't", "don't", "doesn't", "wasn't", "can't", "cannot"})
SCALE = 2.0  # So many glad words more than sad ones take a reply three quarters of the way to the best score.


def positive(prompts: Sequence[str], responses: Sequence[str], records: Sequence[object]) -> list[float]:
    """One number from -1 to 1 for each reply."""
    return [mood(text) for text in responses]


def mood(text: str) -> float:
    """Glad words less sad ones; a word that is denied counts for the other side.

    >>> mood("I love it, it is great!") > 0 > mood("not good")
    True
    """
    words = re.findall(r"[a-z']+", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    total = 0
    for i, word in enumerate(words):
        worth = (word in GLAD) - (word in SAD)
        total += -worth if NOT & set(words[max(i - 2, 0) : i]) else worth
    return math.tanh(total / SCALE)
