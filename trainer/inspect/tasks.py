"""Kinds of task among prompts: those of the InstructGPT paper, code and maths, by rules that anybody can read.

Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, table 1. The rules are English ones and look at the last message
of the user: how it begins (after "please", "can you" and the like), how its last paragraph begins, whether it asks,
whether it brings a text along. The first rule that applies decides; a prompt that none applies to is "other".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trainer.data.prompt import ASSISTANT, HUMAN
from trainer.inspect.rows import Row

HEAD, TAIL = 4000, 1000  # Letters of a message that are looked at; no task is stated in between.
PASSAGE = 25  # words beside the instruction that make a text

POLITE = re.compile(
    r"(?:\W|(?:please|kindly|hi|hello|hey|ok|okay|so|now|and|then|also|first|well|great|thanks|thank you|assistant|"
    r"(?:can|could|would|will) (?:you|u)(?: please| help me(?: to)?)?|i (?:want|need|would like) you to|"
    r"i'd like you to|"
    r"help me(?: to)?|let's|your task is to|you (?:should|must|are asked to)|try to|just)\b){0,8}"
)
PROGRAM = (
    r"(?:python|javascript|typescript|java|c\+\+|c#|rust|golang|php|sql|html|css|bash|shell|regex|regular expression|"
    r"function|code|script|algorithm|api|unit tests?|query|method|program (?:that|to|which|in|for)|web ?page|website|"
    r"dockerfile|leetcode|class (?:that|named|called|in python|in java))"
)
CODE = re.compile(
    r"(?:write|implement|create|build|make|fix|debug|refactor|optimi[sz]e|complete|generate|convert|translate|explain|"
    rf"give me|show me|what does|code)\b.{{0,60}}?\b{PROGRAM}(?!\w)"
)
SOURCE = re.compile(
    r"```|^[ \t]*(?:def \w+\(|#include\b|public (?:static|class)\b|import \w+$|from \w+ import\b|"
    r"(?:async )?function \w+\(|"
    r"select\b.{1,200}?\bfrom\b|traceback \(most recent)",
    re.M,
)
# A sum that is written out; a hyphen alone may stand in a date or a telephone number, a stroke in "and/or".
SUM = re.compile(r"\d ?[+*×÷^] ?[\d(x]|\d - \d|\d / \d|\d ?= ?[\dx?]|\bx ?[+=-] ?\d|\\frac|\\int\b|\\sum\b|√|∫")
CALCULATE = re.compile(
    r"(?:solve|compute|calculate|evaluate|simplify|factor|differentiate|integrate|prove|round|add|subtract|multiply|"
    r"divide|what is|what's|how much is|find|determine|convert \d)\b"
)
MATHS_WORDS = re.compile(
    r"\b(?:equation|integral|derivative|polynomial|theorem|triangle|probability|square root|prime (?:number|factor)s?|"
    r"matrix|fractions?|logarithm|greatest common|least common|perimeter|circumference|hypotenuse)\b"
)
AMOUNT = re.compile(
    r"\b(?:how (?:many|much|far|long|old|tall|fast|often|big|heavy)|what(?:'s| is| was| are| were| will be| would be) "
    r"(?:the|his|her|their|its|half|twice|\w+'s?) (?:\w+ ){0,4}?(?:total|average|sum|difference|ratio|number|"
    r"cost|price|"
    r"percentage|area|volume|distance|speed|profit|age|amount|length|weight|height|value|population|probability|"
    r"salary|bill|share|score|temperature)|what (?:percent|percentage|fraction|portion|number|score|amount)|"
    r"(?:calculate|find|determine) (?:the|how|\w+'s?))\b"
)
NUMBER = re.compile(
    r"\d[\d.,]*|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundred|half|"
    r"third|quarter|twice|double|triple|thrice|dozen|times|percent)\b"
)
LABEL = re.compile(r"^[ \t]*(?:text|passage|context|article|paragraph|document|review|e-?mail|input|story)s? ?:", re.M)
QUESTION = re.compile(
    r"(?:what|whats|what's|who|whose|whom|who's|when|where|where's|why|which|how|how's|is|are|was|were|do|does|did|can|"
    r"could|should|would|will|has|have|had|may|might|am|isn't|aren't|don't|doesn't|if i|explain|describe|define|"
    r"tell me|teach me|show me|discuss|compare|give me (?:some )?(?:info|information|details|instructions|advice)|"
    r"what are|answer|i wonder|any idea)\b"
)
CHAT = re.compile(
    r"\W*(?:hi|hello|hey|yo|good (?:morning|afternoon|evening|night)|thanks|thank you|bye|goodbye|how are you|"
    r"how's it going|what's up|who are you|what are you|what is your (?:name|favou?rite)|what's your (?:name|"
    r"favou?rite)|"
    r"are you (?:a|an|real|human|alive|happy|ok|okay|sentient|there)|do you (?:like|love|feel|enjoy|want|"
    r"have feelings)|"
    r"i love you|i hate you|let's (?:chat|talk))\b"
)
# The first rules of the list, by how a message or its last paragraph begins.
BEGINNINGS = {
    "summarisation": re.compile(
        r"(?:summari[sz]e|sum up|tl;?dr|condense|shorten|give (?:me )?(?:a|the) (?:\w+ ){0,2}?(?:summary|gist|"
        r"main points)|"
        r"(?:write|provide|create|generate|make|produce|draft) (?:\w+ ){0,4}?(?:summary|synopsis|abstract)|"
        r"what (?:is|are) the (?:main|key) (?:idea|point|takeaway)s?)\b"
    ),
    "rewriting": re.compile(
        r"(?:rewrite|re-write|rephrase|paraphrase|reword|translate|edit|proofread|polish (?:the|this|my)|"
        r"correct (?:the|this|my|any|all|grammar)|fix (?:the|this|my) (?:\w+ )?(?:grammar|spelling|sentence|"
        r"text|typos?)|"
        r"improve (?:the|this|my) (?:\w+ )?(?:text|sentence|paragraph|essay|e-?mail|writing)|change (?:the|this) |"
        r"make (?:this|it|the following|the (?:text|sentence|paragraph)) (?:\w+ ){0,4}?(?:more|less|sound|"
        r"shorter|longer|"
        r"formal|polite|clearer|better|simpler)|turn (?:this|the following|these)|convert (?:this|the|these)|"
        r"simplify (?:this|the) (?:text|sentence|paragraph|passage)|replace (?:the|all|every)|"
        r"how (?:do|would) (?:you|i) say .{1,80} in (?:french|german|spanish|chinese|japanese|italian|english))\b"
    ),
    "classification": re.compile(
        r"(?:classify|categori[sz]e|label (?:the|this|these|each)|rate (?:the|this|these|each)|group (?:the|these)|"
        r"decide (?:if|whether|which)|determine (?:if|whether|the sentiment|the category)|identify (?:if|"
        r"whether|which)|"
        r"true or false|is (?:this|the following|the (?:text|review|sentence|tweet)).{0,80}?(?:positive|negative|spam|"
        r"sarcastic|true or false|toxic|neutral)|what is the sentiment|which (?:category|class|of (?:these|"
        r"the following))|"
        r"does the (?:premise|sentence|text) (?:entail|contradict)|sort (?:these|the following|them) into|"
        r"assign (?:a|the|each)|predict (?:the|whether|if))\b"
    ),
    "extraction": re.compile(
        r"(?:extract|pull out|parse|(?:list|find|identify|get|name|highlight|underline|tell me|give me|"
        r"write down|copy) "
        r"(?:all|every|each|the|any)(?: \w+){0,8}? (?:in|from|of|mentioned|named) (?:in )?(?:the|this|these|"
        r"that) (?:\w+ )?"
        r"(?:text|passage|article|paragraph|sentence|document|e-?mail|story|following|table|list|review|data|"
        r"input)s?)\b"
    ),
    "brainstorming": re.compile(
        r"(?:brainstorm|what are (?:some|a few|good|the best|\d+|two|three|four|five|ten)|"
        r"(?:list|name|give|suggest|recommend|think of|come up with|provide|share|generate|propose|offer|tell|"
        r"find|make) "
        r"(?:me |us )?(?:a list of|some|a few|several|\d+|two|three|four|five|six|seven|eight|nine|ten|many|"
        r"a couple of|"
        r"(?:(?:more|other|different|good) )?(?:examples|ideas|things|reasons|ways|tips|names|suggestions)|as many)|"
        r"(?:suggest|recommend|list|ideas? (?:for|on|to)|any (?:ideas?|tips?|suggestions?|recommendations?|advice)))\b"
    ),
    "generation": re.compile(
        r"(?:write|compose|draft|create|generate|invent|imagine|continue|finish|complete|design|produce|"
        r"develop|prepare|"
        r"pretend|act as|role-?play|sing|come up with|outline|plan|construct|build|form a|craft|"
        r"tell (?:me|us) (?:a|an|another|one|some)(?: \w+){0,3}? (?:story|stories|jokes?|poem|tale|fact|riddle|lie)|"
        r"make (?:me |us |up )?(?:a|an|up|some|another)|give (?:me |us )?(?:a|an|another)|"
        r"once upon a time|in the style of)\b"
    ),
}
KINDS = (
    "generation", "open question", "closed question", "brainstorming", "chat", "rewriting", "summarisation",
    "classification", "extraction", "code", "maths", "other",
)  # fmt: skip


def tasks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows and their share for each kind of task that occurs, most frequent first.

    Args:
        rows: Well-formed rows; one that stands beside a prompt again counts again.
    """
    counts = Counter(kind_of_task(row.prompt) for row in rows)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], KINDS.index(item[0])))
    return [{"name": kind, "rows": count, "share": count / len(rows)} for kind, count in ordered]


def kind_of_task(prompt: str) -> str:
    r"""One of ``KINDS``.

    Args:
        prompt: A text, or turns marked `\n\nHuman:` and `\n\nAssistant:`.

    >>> kind_of_task("Write a poem about rain."), kind_of_task("\n\nHuman: How do I boil an egg?\n\nAssistant:")
    ('generation', 'open question')
    """
    message, before = last_message(prompt)
    text = (message if len(message) <= HEAD + TAIL else f"{message[:HEAD]}\n\n{message[-TAIL:]}").strip().lower()
    text = text.replace("’", "'")
    asks = "?" in text[-200:]
    begin = _beginnings(text)
    passage = _brings_text(text)
    if SOURCE.search(text) or any(CODE.match(text, at) for at in begin):
        return "code"
    if _is_maths(text, begin, asks):
        return "maths"
    if text.endswith(("tl;dr:", "tl;dr", "summary:")):
        return "summarisation"
    for kind, rule in BEGINNINGS.items():
        if any(rule.match(text, at) for at in begin):
            return kind
    if before or CHAT.match(text):
        return "chat"
    if asks or any(QUESTION.match(text, at) for at in begin):
        return "closed question" if passage else "open question"
    return "other"


def last_message(prompt: str) -> tuple[str, bool]:
    r"""What the user said last, and whether an assistant has spoken before.

    >>> last_message("\n\nHuman: Hi\n\nAssistant: Hi!\n\nHuman: Why?\n\nAssistant:"), last_message("Why?")
    ((' Why?', True), ('Why?', False))
    """
    start = prompt.rfind(HUMAN)
    message = prompt[start + len(HUMAN) :] if start >= 0 else prompt
    return message.removesuffix(ASSISTANT), start > 0 and ASSISTANT in prompt[:start]


def _beginnings(text: str) -> list[int]:
    """Where the message and its last paragraph begin, behind polite words."""
    last = text.rfind("\n")
    starts = [0] if last < 0 else [0, last + 1]
    return [found.end() for at in starts if (found := POLITE.match(text, at))]


def _brings_text(text: str) -> bool:
    """Whether a text stands beside the instruction, which is the first paragraph or the last one."""
    if LABEL.search(text):
        return True
    parts = [len(part.split()) for part in text.split("\n") if part.strip()]
    return len(parts) > 1 and sum(parts) - min(parts[0], parts[-1]) >= PASSAGE


def _is_maths(text: str, begin: Sequence[int], asks: bool) -> bool:
    """A sum to work out, or a question for an amount with two numbers to make it of."""
    told = asks or any(CALCULATE.match(text, at) for at in begin)
    if told and (SUM.search(text) or (MATHS_WORDS.search(text) and NUMBER.search(text))):
        return True
    return AMOUNT.search(text) is not None and len(NUMBER.findall(text)) >= 2
