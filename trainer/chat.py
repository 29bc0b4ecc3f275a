"""Chat templates: a conversation becomes the text that its model was trained on, and a reply stays tokens of its own.

The stages encode the rendered prompt and the reply apart and join token ids. Nothing is cut out of a rendered
conversation, so a template that writes the same turn differently once another follows (it drops earlier reasoning,
say) does no harm: the prompt is what the model will see when it answers, and the reply is what it should say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data_format import Message, Render, render_turns
from trainer.text import encode

TINY = "tiny"
ASKED, SAID = {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A test."}


class ChatTemplate:
    r"""A tokenizer's chat template, as ``data.read`` takes it.

    Args:
        tokenizer: One with a chat template.

    Raises:
        ValueError: The template fails on a plain question, or ends a reply with something else than the tokenizer's
            end-of-sequence token, which every stage puts there: the model would never learn to stop.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A marker inside of a message would end the turn wherever it stands.
        self.markers = sorted(set(tokenizer.all_special_tokens))
        self._check()

    def __call__(self, messages: Sequence[Message]) -> str:
        """The prompt of the next reply.

        Args:
            messages: Dictionaries with ``role`` and ``content``.

        Raises:
            ValueError: A message holds a special token of the tokenizer, or the template refuses the conversation.
        """
        for message in messages:
            self.refuse_markers(message["content"])
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like, mostly jinja2.TemplateError
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def refuse_markers(self, text: str) -> None:
        """Raises ValueError where a text holds a special token."""
        for marker in self.markers:
            if marker in text:
                raise ValueError(f"a message holds the special token {marker!r}, which would end or open a turn")

    def prefix_stable(self) -> bool:
        """Whether a conversation begins, token for token, with the prompt of its last reply.

        Training does not need it; code that cuts rendered conversations apart does.
        """
        whole = self.tokenizer.apply_chat_template([ASKED, SAID, ASKED, SAID], tokenize=False)
        prompt = self([ASKED, SAID, ASKED])
        long, short = encode(self.tokenizer, [whole, prompt])
        return long[: len(short)] == short

    def _check(self) -> None:
        prompt = self([ASKED])
        whole = self.tokenizer.apply_chat_template([ASKED, SAID], tokenize=False)
        _, found, rest = whole.rpartition(SAID["content"])
        if not prompt or not found:
            raise ValueError("the chat template loses the text of a plain question and its answer")
        end = encode(self.tokenizer, [rest.lstrip()])[0][:1]
        if end and end != [self.tokenizer.eos_token_id]:
            raise ValueError(
                f"the chat template ends a reply with {self.tokenizer.decode(end)!r}, the tokenizer's end-of-sequence "
                f"token is {self.tokenizer.eos_token!r}: set eos_token to the former in tokenizer_config.json"
            )


def render_of(tokenizer: Any) -> Render:
    """How a tokenizer's model reads conversations: by its chat template, or in plain turns without one."""
    return ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else render_turns


def render_for(model: str) -> Render:
    """The same by a model's name, before the model itself is loaded.

    Args:
        model: A run folder, a local directory, a hub id, or "tiny", which is trained on plain turns.
    """
    if model == TINY:
        return render_turns
    from trainer.model_files import tokenizer_of
    from trainer.models import resolve

    return render_of(tokenizer_of(resolve(model)))
