r"""A prompt: the text that one model reads, and the conversation from which another model's text can be made.

A model with a chat template reads conversations through it, and any other in plain turns, `\n\nHuman:` and
`\n\nAssistant:`. So a prompt remembers its messages, and whoever reads it renders them anew (``trainer.data.chat``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


class Prompt(str):
    """What a model is asked, as its own tokenizer is to read it.

    Attributes:
        messages: The conversation; None where every tokenizer is to read the text as it is.
        written: The text as it stands in the data file; None where the file has messages.
        date: The day that a chat template writes, as 2026-11-28; None is today.
    """

    messages: tuple[Message, ...] | None
    written: str | None
    date: str | None

    def __new__(
        cls, text: str, messages: Sequence[Message] | None = None, written: str | None = None, date: str | None = None
    ) -> Prompt:
        made = super().__new__(cls, text)
        made.messages = None if messages is None else tuple(messages)
        made.written, made.date = written, date
        return made

    @property
    def plain(self) -> str:
        """As a person reads it, and a model without a chat template: the file's own text, or plain turns."""
        if self.written is not None:
            return self.written
        return str(self) if self.messages is None else turns(self.messages)


class Render(Protocol):
    """Turns the messages before a reply into a prompt."""

    def __call__(self, messages: Sequence[Message], /) -> str: ...


class Turns:
    """Plain turns, for models without a chat template.

    Args:
        raw: A prompt that is a text is nothing but this text, for whichever model reads it.
        date: The day that the templates of other models which read these prompts are to write; None is today.
    """

    lead = " "  # Transcripts leave the blank behind `Assistant:` to the reply.

    def __init__(self, *, raw: bool = False, date: str | None = None) -> None:
        self.raw, self.date = raw, date

    def __call__(self, messages: Sequence[Message]) -> Prompt:
        r"""Writes a conversation as plain turns and opens the assistant's next one.

        Args:
            messages: Dictionaries with `role` (system, user or assistant) and `content`.

        Returns:
            The prompt; a reply to it starts with a space.

        >>> Turns()([{"role": "user", "content": "Hello?"}])
        '\n\nHuman: Hello?\n\nAssistant:'
        """
        return Prompt(turns(messages), messages, date=self.date)

    def text(self, text: str) -> Prompt:
        """A prompt that is a text, as it stands in the file."""
        return Prompt(text, None if self.raw else conversation(text), text, self.date)


render_turns = Turns()


def turns(messages: Sequence[Message]) -> str:
    """A conversation in plain turns, the assistant's next one opened."""
    label = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}
    return "".join(label[m["role"]] + m["content"] for m in messages) + ASSISTANT


def conversation(text: str) -> list[Message]:
    r"""The messages that a text stands for: the turns of a transcript, or else one of the user.

    What stands before the first turn of a transcript is a system message.

    >>> [m["content"] for m in conversation("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:")]
    ['Hi', 'Hello', 'Bye']
    >>> conversation("2 + 2?")
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    whole = "\n\n" + text.strip()
    if not (whole.endswith(ASSISTANT) and HUMAN in whole):
        return [{"role": "user", "content": text}]
    before, *parts = TURN.split(whole)
    found: list[Message] = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for label, said in zip(parts[:-2:2], parts[1:-2:2], strict=True):  # The last turn is open.
        role, content = ROLES[label], said.strip()
        if found and found[-1]["role"] == role:  # Many templates refuse two turns of one speaker.
            content = f"{found.pop()['content']}\n\n{content}"
        found.append({"role": role, "content": content})
    return found


def asked(prompt: str) -> str:
    """A prompt as a person reads it, which still knows its messages: for functions, judges and the screen."""
    if not isinstance(prompt, Prompt):
        return prompt
    return Prompt(prompt.plain, prompt.messages, prompt.written, prompt.date)


def fitting(prompt: str, reply: str, *, template: bool) -> str:
    r"""A reply with the leading blank that its prompt asks for: plain turns leave it to the reply, templates do not.

    >>> fitting(Turns()([{"role": "user", "content": "Hi"}]), "Hello", template=False)
    ' Hello'
    """
    if not (isinstance(prompt, Prompt) and prompt.messages is not None and prompt.plain.rstrip().endswith(ASSISTANT)):
        return reply
    if template:  # A reply to messages that a template has rendered has no blank but its own.
        return reply.removeprefix(" ") if prompt.written is not None or prompt == prompt.plain else reply
    return reply if reply[:1].isspace() or not prompt.plain.endswith(ASSISTANT) else " " + reply
