"""Chat templates: a conversation becomes the text that its model was trained on, prompt and reply alike.

The prompt is what the model will see when it answers. The reply is what the template writes behind it, up to the token
that ends it, where the rendered conversation begins with the rendered prompt. Some templates write a finished
conversation differently (they drop the reasoning of its reply, say); then the reply is its own text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from datetime import date as day
from datetime import datetime, time
from typing import Any, Literal

from trainer.data.prompt import Message, Prompt, Turns, conversation, render_turns
from trainer.data.tokenizer import encode, markers, without_end

TINY = "tiny"
Format = Literal["auto", "chat", "raw"]
ASKED, SAID = {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A test."}
OPENED = re.compile(r"(<[^<>|/\s]+>)(\s*)\Z")  # `<think>` at the end of a prompt


class Marked(ValueError):
    """A text holds a special token."""


class ChatTemplate:
    """A tokenizer's chat template, as ``data.read`` takes it.

    Args:
        tokenizer: One with a chat template.
        raw: A prompt that is a text is used as it is, because it was rendered before.
        date: The day that templates which write a date are to write, as 2026-11-28; None is today.

    Attributes:
        end: The token that ends a reply, as text.
        behind: What the template writes behind a reply's text: this token, and whatever stands around it.

    Raises:
        ValueError: The template fails on a plain question, loses its text, or ends a reply with something that is no
            token by itself: the model would never learn to stop.
    """

    lead = ""

    def __init__(self, tokenizer: Any, *, raw: bool = False, date: str | None = None) -> None:
        self.tokenizer, self.raw, self.date = tokenizer, raw, date
        self.markers = markers(tokenizer)
        self.blank, self.end, self.behind = self._around()

    def __call__(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of the next reply.

        Args:
            messages: Dictionaries with ``role`` and ``content``.

        Raises:
            ValueError: A message holds a special token of the tokenizer, or the template refuses the conversation.
        """
        for message in messages:
            self.refuse_markers(message["content"])
        if messages[-1]["role"] == "assistant":  # A template that wants turns to alternate refuses the reply to that.
            self._apply([*messages, SAID])
        return Prompt(self._apply(messages, add_generation_prompt=True), messages, date=self.date)

    def text(self, text: str) -> Prompt:
        """A prompt that is a text: a user's message, the turns of a transcript, or what it is.

        Raises:
            ValueError: As for messages.
        """
        if self.raw:
            return Prompt(text, None, text)
        messages = conversation(text)
        try:
            return Prompt(self(messages), messages, text, self.date)
        except Marked as error:
            raise ValueError(f"{error}; prompts that are rendered already want prompt_format=raw") from None

    def said(self, text: str) -> str:
        """A reply as people write it into their data, without the token that ends it.

        Raises:
            ValueError: It holds another special token.
        """
        text = self.without_end(text)
        if not self.raw:
            self.refuse_markers(text)
        return text

    def reply(self, prompt: Prompt, text: str) -> str:
        """What stands behind the rendered prompt, up to the token that ends the reply, and without it.

        Args:
            prompt: As this template has rendered it.
            text: The reply.
        """
        assert prompt.messages is not None
        text, opened = self.without_end(text), OPENED.search(prompt)
        whole = self._apply([*prompt.messages, {"role": "assistant", "content": text}])
        if opened and text.lstrip().startswith(opened[1]):  # The prompt has opened the place for the reasoning.
            text = text.lstrip().removeprefix(opened[1]).removeprefix(opened[2])
        if not whole.startswith(prompt):
            return text if text[:1].isspace() else self.blank + text
        body = whole[len(prompt) :].removesuffix(self.behind)
        end = self.behind.find(self.end) if self.end else -1
        kept = body + self.behind[:end] if end >= 0 else body
        return kept if _holds(body, text) else text

    def without_end(self, text: str) -> str:
        """A reply without the token that ends it, which people write into their data now and then."""
        return without_end(text, self.end, self.tokenizer.eos_token)

    def refuse_markers(self, text: str) -> None:
        """Raises ValueError where a text holds a special token."""
        for marker in self.markers:
            if marker in text:
                raise Marked(f"a message holds the special token {marker!r}, which would end or open a turn")

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        now = datetime.combine(day.fromisoformat(self.date) if self.date else today(), time())
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, strftime_now=now.strftime
            )
        except Exception as error:  # templates raise what they like, mostly jinja2.TemplateError
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def _around(self) -> tuple[str, str, str]:
        """The blank before a reply, the token that ends it, and everything that is written behind its text."""
        prompt, eos = self._apply([ASKED], add_generation_prompt=True), self.tokenizer.eos_token or ""
        whole = self._apply([ASKED, SAID])
        before, found, behind = whole.rpartition(SAID["content"])
        if not prompt or not found:
            raise ValueError("the chat template loses the text of a plain question and its answer")
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        blank = "" if lead.strip() else lead
        first = encode(self.tokenizer, [behind.lstrip()])[0][:1]
        if not first:
            return blank, eos, behind
        token = self.tokenizer.added_tokens_decoder.get(first[0])  # One that is read as a whole wherever it stands.
        end = None if token is None else str(token)
        if end is None or (end == self.tokenizer.bos_token and end != eos):
            raise ValueError(
                f"the chat template ends a reply with {self.tokenizer.decode(first)!r}, the tokenizer's "
                f"end-of-sequence token is {eos!r}: set eos_token to the former in tokenizer_config.json, or leave "
                "the template out with prompt_format=raw"
            )
        return blank, end, behind


def _holds(body: str, text: str) -> bool:
    """Whether the letters of a text stand in another one, in their order: nothing of it was dropped."""
    letters = iter(body)
    return all(letter in letters for letter in text if not letter.isspace())


@functools.cache
def today() -> day:
    """The day on which this process first asked: a run over midnight stays one run."""
    return day.today()


def settle_date(config: Any) -> None:
    """Gives a new configuration, which is frozen, the day that its chat templates write.

    Raises:
        ValueError: ``template_date`` is no day.
    """
    value = config.template_date or today()  # YAML makes a day of 2026-11-28, or a time.
    try:
        value = value.date() if isinstance(value, datetime) else value
        value = value if isinstance(value, day) else day.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"template_date: got {value!r:.60}, want a day such as 2026-11-28") from None
    object.__setattr__(config, "template_date", value.isoformat())


@functools.lru_cache(maxsize=64)
def _made(tokenizer: Any, _text: str, raw: bool, date: str | None) -> ChatTemplate:
    """One template for many prompts; its text is there to tell it from an earlier one of the same tokenizer."""
    return ChatTemplate(tokenizer, raw=raw, date=date)


def render_of(tokenizer: Any, prompt_format: Format = "auto", date: str | None = None) -> ChatTemplate | Turns:
    """How a tokenizer's model reads conversations: by its chat template, or in plain turns without one.

    Args:
        tokenizer: Of the model.
        prompt_format: What a prompt is that is a text: with auto a user's message where there is a template, with chat
            the same and there must be one, with raw the text itself.
        date: The day that a template writes, as 2026-11-28; None is today.

    Raises:
        ValueError: The template would mislead, or there is none and ``prompt_format`` is chat.
    """
    raw, plain = prompt_format == "raw", render_turns if date in (None, today().isoformat()) else Turns(date=date)
    if template := getattr(tokenizer, "chat_template", None):
        try:
            return _made(tokenizer, repr(template), raw, date)
        except ValueError:
            if not raw:
                raise
    if prompt_format == "chat":
        raise ValueError("prompt_format: got chat, and the model's tokenizer has no chat template; want auto or raw")
    return Turns(raw=True, date=date) if raw else plain


def template_of(tokenizer: Any, date: str | None = None) -> ChatTemplate | None:
    """A tokenizer's chat template, if it has one that can be used."""
    render = render_of(tokenizer, "raw", date)
    return render if isinstance(render, ChatTemplate) else None


def rendered(tokenizer: Any, prompt: str) -> str:
    """A prompt as this tokenizer's model reads it, for whichever model it was rendered before."""
    if not isinstance(prompt, Prompt) or prompt.messages is None:
        return prompt
    template = template_of(tokenizer, prompt.date)
    return prompt.plain if template is None else template(prompt.messages)


def ends(tokenizer: Any, suggested: int | Sequence[int] | None = None) -> list[int]:
    """Ids at which a response ends: the tokenizer's, the template's, and those that a model suggests.

    Args:
        tokenizer: Of the policy.
        suggested: ``eos_token_id`` of its generation options.
    """
    found = [tokenizer.eos_token_id, *([suggested] if isinstance(suggested, int) else suggested or [])]
    if template := template_of(tokenizer):
        found.insert(1, tokenizer.convert_tokens_to_ids(template.end))
    return list(dict.fromkeys(end for end in found if end is not None))
