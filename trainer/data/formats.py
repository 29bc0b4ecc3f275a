"""From the field names people use to the four kinds of record the stages train on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from trainer.data.prompt import ASSISTANT, Message, Prompt, Render, render_turns

Record = dict[str, Any]

PROMPT_FIELDS = ("prompt", "question", "instruction")
RESPONSE_FIELDS = ("response", "completion", "output", "answer")

MOST = sys.float_info.max
SHOWN, LONGEST = 12, 60  # names that a message quotes, and letters of each

EMPTY = "an empty reply (a model trained on it would learn to say nothing)"
IDENTICAL = "identical replies, one preferred to the other (there is no preference to learn)"
TIED = "the same rank for every reply (there is no preference to learn)"


class Unusable(Exception):
    """A well-formed row that has nothing to teach; its text is one of EMPTY, IDENTICAL, TIED."""


def demonstration(row: Record, render: Render = render_turns) -> Record:
    """`{"prompt", "response"}` from prompt and response, a conversation, a transcript, or the chosen one of a pair.

    Args:
        row: One parsed line.
        render: Turns the messages before the reply into a prompt (a tokenizer's chat template, say).

    Raises:
        ValueError: A field is missing or has the wrong type; the message names it.
        Unusable: The reply is empty.
    """
    if "messages" in row:
        prompt, response = _split_messages(row["messages"], "messages", render)
    elif "chosen" in row:
        prompt, response = _side(row, "chosen", render)
    elif "text" in row and not _first(row, PROMPT_FIELDS):
        prompt, response = _split_transcript(_text(row, "text"), "text", render)
    else:
        prompt = _prompt(row, render)
        response = _reply(row, _need(row, RESPONSE_FIELDS, "response"), render)
    response = _own(response, render)
    if not response.strip():
        raise Unusable(EMPTY)
    return {"prompt": prompt, "response": response}


def ranked(row: Record, render: Render = render_turns) -> Record:
    """`{"prompt", "responses", "ranks"}`, lower rank is better, from a pair or from K ranked replies.

    Args:
        row: One parsed line.
        render: As in `demonstration`.

    Raises:
        ValueError: A field is missing or has the wrong type; the message names it.
        Unusable: A reply is empty, two replies of different rank are identical, or all ranks tie.
    """
    record = ranking(row, render)
    responses, ranks = record["responses"], record["ranks"]
    if not all(r.strip() for r in responses):
        raise Unusable(EMPTY)
    if len(set(ranks)) == 1:
        raise Unusable(TIED)
    if len(set(responses)) < len(set(zip(responses, ranks, strict=True))):
        raise Unusable(IDENTICAL)
    return record


def ranking(row: Record, render: Render = render_turns) -> Record:
    """As `ranked`, without asking whether there is anything to learn.

    Raises:
        ValueError: A field is missing or has the wrong type; the message names it.
    """
    if "responses" in row:
        prompt, responses, ranks = _prompt(row, render), _responses(row), _ranks(row)
        if len(responses) != len(ranks):
            raise ValueError(f"{len(responses)} responses but {len(ranks)} ranks")
    else:
        prompt, *responses = _pair(row, render)
        ranks = [0, 1]
    return {"prompt": prompt, "responses": [_own(r, render) for r in responses], "ranks": ranks}


def labelled(row: Record, render: Render = render_turns) -> Record:
    """`{"prompt", "responses", "labels"}`, true where a reply is desirable, from one reply with a `label`, from replies
    with `correct`, or from a pair, whose chosen reply is desirable and whose rejected one is not.

    Args:
        row: One parsed line.
        render: As in `demonstration`.

    Raises:
        ValueError: A field is missing or has the wrong type; the message names it.
        Unusable: A reply is empty, or the two of a pair are identical.

    >>> labelled({"prompt": "p", "completion": "r", "label": False})
    {'prompt': 'p', 'responses': ['r'], 'labels': [False]}
    """
    if "label" in row:
        if row["label"] not in (True, False):
            raise ValueError(f"label must be true or false, got {_kind(row['label'])}")
        one = demonstration(row, render)
        return {"prompt": one["prompt"], "responses": [one["response"]], "labels": [bool(row["label"])]}
    if "responses" not in row and "chosen" not in row:
        raise ValueError(f"no label: want label, or chosen and rejected; found {_found(row)}")
    if "responses" in row and "correct" not in row:
        raise ValueError("responses need correct, a list of true and false; ranks do not say which reply is desirable")
    record = ranking(row, render)
    responses, labels = record["responses"], [rank == 0 for rank in record["ranks"]]
    if not all(r.strip() for r in responses):
        raise Unusable(EMPTY)
    if len(set(responses)) < len(set(zip(responses, labels, strict=True))):
        raise Unusable(IDENTICAL)
    return {"prompt": record["prompt"], "responses": responses, "labels": labels}


def prompt_only(row: Record, render: Render = render_turns) -> Record:
    """`{"prompt", "extra"}`; `extra` holds every other field, for reward functions (an expected answer, say).

    Raises:
        ValueError: There is no prompt, or it is not text.
    """
    field = _first(row, PROMPT_FIELDS)
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        prompt = render(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
        used = {"messages", field}
    elif "chosen" in row and (field is None or _is_conversation(row["chosen"])):
        prompt, used = _pair(row, render)[0], {field} if field else {"chosen", "rejected"}
    elif field:
        prompt, used = _prompt(row, render), {field, "input"} if field == "instruction" else {field}
    else:
        raise ValueError(f"no prompt: want one of {', '.join(PROMPT_FIELDS)}, messages; found {_found(row)}")
    return {"prompt": prompt, "extra": {k: v for k, v in row.items() if k not in used}}


def text_only(row: Record, render: Render = render_turns) -> Record:
    """`{"text"}`, whole.

    Raises:
        ValueError: There is no text, or it is none; the message names it.
    """
    return {"text": _text(row, _need(row, ("text",), "text"))}


def _pair(row: Record, render: Render) -> tuple[str, str, str]:
    """Prompt, chosen, rejected; whole transcripts are parted at the last assistant turn that both open alike."""
    for field in ("chosen", "rejected"):
        _need(row, (field,), field)
    if isinstance(row["chosen"], list) or _first(row, PROMPT_FIELDS):
        (prompt, chosen), (other, rejected) = _side(row, "chosen", render), _side(row, "rejected", render)
        if prompt != other:
            raise ValueError("chosen and rejected answer different conversations")
        return prompt, chosen, rejected
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    common = commonprefix([chosen, rejected])  # noqa: RUF071 (characters, not path components, are meant)
    prompt, rest = _split_transcript(common, "the common part of chosen and rejected", render)
    cut = len(common) - len(rest)
    return prompt, chosen[cut:], rejected[cut:]


def _side(row: Record, field: str, render: Render) -> tuple[str, str]:
    """One side of a pair as (prompt, reply), whether the side holds the reply alone or everything before it too."""
    value = row[field]
    if _is_conversation(value):
        return _split_messages(value, field, render)
    if isinstance(value, list) or _first(row, PROMPT_FIELDS):
        return _prompt(row, render), _reply(row, field, render)
    return _split_transcript(_text(row, field), field, render)


def _is_conversation(value: Any) -> bool:
    """Whether it is a list of messages that begins before the reply; such a list goes before a prompt beside it."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") != "assistant"


def _split_transcript(text: str, field: str, render: Render) -> tuple[str, str]:
    r"""Cuts behind the last `\n\nAssistant:`, so that prompt + reply is the transcript, character for character."""
    cut = text.rfind(ASSISTANT)
    if cut < 0:
        raise ValueError(f"no prompt field, and {field} holds no {ASSISTANT!r} turn to split at")
    return _of_text(text[: cut + len(ASSISTANT)], render), text[cut + len(ASSISTANT) :]


def _of_text(text: str, render: Render) -> str:
    """A prompt that is a text; what reads conversations in its own way reads this one so, too."""
    return getattr(render, "text", Prompt)(text)


def _split_messages(value: Any, field: str, render: Render) -> tuple[str, str]:
    messages = _messages(value, field)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(f"{field} must end with an assistant's reply to something")
    return render(messages[:-1]), _said(messages[-1]["content"], render)


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} must be a list of messages, got {_kind(value)}")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{field}: every message needs a role (system, user or assistant) and content")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{field}: content must be text, got {_kind(message.get('content'))}")
    # Columnar files write null where a message lacks what another has, and templates would find it there.
    return [{key: x for key, x in message.items() if x is not None} for message in value]


def _prompt(row: Record, render: Render) -> str:
    field = _need(row, PROMPT_FIELDS, "prompt")
    if isinstance(row[field], list):
        return render(_messages(row[field], field))
    prompt = _text(row, field)
    if field == "instruction" and row.get("input"):
        prompt += "\n\n" + _text(row, "input")
    if not prompt.strip():
        raise ValueError(f"{field} is empty")
    return _of_text(prompt, render)


def _reply(row: Record, field: str, render: Render) -> str:
    if not isinstance(row[field], list):
        return _text(row, field)
    messages = _messages(row[field], field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"{field} must be one assistant message")
    return _said(messages[0]["content"], render)


def _own(reply: str, render: Render) -> str:
    """A reply without the token that a template ends it with; a template refuses any other."""
    return getattr(render, "said", str)(reply)


def _said(content: str, render: Render) -> str:
    """Our own turns leave the space before the reply to the reply, as transcripts do; templates bring their own."""
    return getattr(render, "lead", "") + content


def _responses(row: Record) -> list[str]:
    value = row["responses"]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(r, str) for r in value):
        raise ValueError(f"responses must be a list of two or more texts, got {_kind(value)}")
    return value


def _ranks(row: Record) -> list[float]:
    field = _need(row, ("ranks", "correct"), "ranks")
    value = row[field]
    if field == "correct":
        if not isinstance(value, list) or not all(c in (True, False) for c in value):
            raise ValueError(f"correct must be a list of true and false, got {_kind(value)}")
        return [0 if c else 1 for c in value]
    if not isinstance(value, list) or not all(is_rank(r) for r in value):
        raise ValueError(f"ranks must be a list of finite numbers (lower is better), got {_kind(value)}")
    return value


def is_rank(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    # An integer may be larger than any float: comparing asks no float of it.
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def _first(row: Record, fields: Sequence[str]) -> str | None:
    return next((f for f in fields if f in row), None)


def _need(row: Record, fields: Sequence[str], what: str) -> str:
    if field := _first(row, fields):
        return field
    names = fields[0] if len(fields) == 1 else f"one of {', '.join(fields)}"
    raise ValueError(f"no {what}: want {names}; found {_found(row)}")


def _text(row: Record, field: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f"{field} must be text, got {_kind(row[field])}")
    return row[field]


def _found(row: Record) -> str:
    """Names of fields, as many and as much of each as a line of a message can take."""
    names = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in sorted(row)]
    return ", ".join(names[:SHOWN] + ["..."] * (len(names) > SHOWN)) or "no fields at all"


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return f"a list of {len(value)}" if isinstance(value, list) else names.get(type(value), f"{value!r:.40}")
