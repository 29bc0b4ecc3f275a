"""From texts to token ids, and the one rule of what is cut where.

What a model reads is decided here, for training, sampling, held-out text and rewards alike: a prompt as its tokenizer's
template renders it, or with what the tokenizer puts before a text; a reply as the template renders it behind the
prompt, or as the tokenizer reads prompt and reply together, if that leaves the prompt's tokens as they are; then the
token that ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from trainer.data.chat import ChatTemplate, ends, rendered, template_of
from trainer.data.packing import Sample
from trainer.data.prompt import Prompt, fitting
from trainer.data.tokenizer import decode, encode, encode_after, prefix, without_end

__all__ = ["decode", "encode", "encode_pairs", "encode_prompts", "encode_texts", "ends", "told_apart"]

Note = Callable[[str], None]
Unit = TypeVar("Unit")


class Read(NamedTuple):
    """A prompt as one tokenizer reads it."""

    text: str
    first: list[int]
    """Ids that stay when the prompt is cut: what the tokenizer puts before a text."""
    rest: list[int]
    bare: list[int]
    """Those of the text alone."""
    template: ChatTemplate | None
    """That has rendered it, if one has."""

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return self.first + self.rest

    def cut(self, room: int) -> list[int]:
        """The last ``room`` ids, the first ones among them where that leaves room for others."""
        rest = room - len(self.first)
        return self.first + self.rest[-rest:] if rest > 0 else self.ids[-room:]


class Tails(NamedTuple):
    """Replies as token ids, with their ends."""

    ids: list[list[int]]
    stopped: int
    """How many held an end before their own."""


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole texts that are not empty, with what the tokenizer puts before a text."""
    return [read.ids for read in _read(tokenizer, [text for text in texts if text])]


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], max_length: int, note: Note | None = None
) -> list[list[int]]:
    """Token ids of prompts, cut on the left.

    Args:
        tokenizer: Of the model that will read them.
        prompts: Texts; a ``Prompt`` is rendered for this tokenizer.
        max_length: Tokens per prompt.
        note: Told once how many were cut, if any.

    Raises:
        ValueError: If a prompt has no tokens, or the tokenizer's template refuses a conversation.
    """
    read = _read(tokenizer, prompts)
    _tell_prompts(read, [max_length] * len(read), note)
    return [prompt.cut(max_length) for prompt in read]


def encode_pairs(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    ended: Sequence[bool] | None = None,
    note: Note | None = None,
    groups: Sequence[int] | None = None,
    whole: bool = False,
) -> list[Sample]:
    """Prompt, response and the token that ends it, at most ``max_length`` tokens in all.

    What fits is not cut. Otherwise a prompt loses its beginning as far as the response needs the room, and keeps half
    of it in any case; a response that does not fit then loses its end and with it the token that ends it, because a cut
    text did not end.

    Args:
        tokenizer: Of the model that will read them.
        prompts: Texts; a ``Prompt`` is rendered for this tokenizer.
        responses: One text per prompt.
        max_length: Tokens per sample.
        ended: Whether each response ended by itself; None is all of them.
        note: Told once how many prompts and how many responses were cut, if any.
        groups: How many of the pairs, one after another, share a prompt, which is then cut alike for all of them.
        whole: Add what a template writes behind the end of a reply, as a model of others was trained to read it.
    """
    read, sizes = _read(tokenizer, prompts), [1] * len(prompts) if groups is None else groups
    replies = [fitting(p, r, template=x.template is not None) for p, r, x in zip(prompts, responses, read, strict=True)]
    tails, stopped = _tails(tokenizer, read, replies, [True] * len(prompts) if ended is None else ended, whole)
    rooms: list[int] = []
    for size in sizes:
        longest = max(map(len, tails[len(rooms) : len(rooms) + size]), default=0)
        rooms += [max(max_length // 2, max_length - longest, 1)] * size
    heads = [prompt.cut(room) for prompt, room in zip(read, rooms, strict=True)]
    samples = [Sample((h + t)[:max_length], min(len(h), max_length)) for h, t in zip(heads, tails, strict=True)]
    _tell_prompts(read, rooms, note)
    cut = sum(len(h) + len(t) > max_length for h, t in zip(heads, tails, strict=True))
    if cut and note is not None:
        note(
            f"{cut} of {len(samples)} responses do not fit into {max_length} tokens behind their prompts; they lose "
            "their end, and with it the end of the sequence."
        )
    if stopped and note is not None:
        note(f"{stopped} of {len(samples)} responses hold the end of a response within their text; they stop there.")
    return samples


def told_apart(
    units: Sequence[Unit], replies: Sequence[tuple[Sequence[Sample], Sequence[Any]]], max_length: int, note: Note | None
) -> list[Unit]:
    """Those units whose replies are still different as a model reads them, trimmed and cut.

    Args:
        units: Pairs, groups or labelled replies.
        replies: The samples of each, and what is said about each sample: its rank or label.
        max_length: For the message.
        note: Told how many are left out.

    Raises:
        ValueError: None is left.
    """
    kept = []
    for unit, (samples, judged) in zip(units, replies, strict=True):
        texts = [tuple(s.tokens) for s in samples]
        if len(set(texts)) == len(set(zip(texts, judged, strict=True))):
            kept.append(unit)
    left_out = len(units) - len(kept)
    if left_out == len(units) > 0:
        raise ValueError(f"data: the replies to each prompt are identical as the model reads them, cut to {max_length}")
    if left_out and note is not None:
        note(
            f"{left_out} of {len(units)} have replies of different rank that read alike, cut to "
            f"{max_length} tokens; they are left out, as there is nothing to learn. Raise max_length if it matters."
        )
    return kept


def _read(tokenizer: Any, prompts: Sequence[str]) -> list[Read]:
    """Prompts uncut."""
    texts, start = [rendered(tokenizer, prompt) for prompt in prompts], prefix(tokenizer)
    found = []
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        # That of the prompt's own day: its reply is rendered behind it.
        template = template_of(tokenizer, text.date) if isinstance(text, Prompt) and text.messages is not None else None
        if start and ids[: len(start)] == start:  # Some templates write it, and so do people.
            found.append(Read(text, start, ids[len(start) :], ids, template))
        else:
            found.append(Read(text, [] if template else start, ids, ids, template))
        if not found[-1].ids:
            raise ValueError(f"data: prompt {str(text)!r} has no tokens")
    return found


def _tails(tokenizer: Any, read: Sequence[Read], replies: Sequence[str], ended: Sequence[bool], whole: bool) -> Tails:
    """Replies behind their prompts, uncut."""
    texts = [_behind(tokenizer, *pair) for pair in zip(read, replies, strict=True)]
    together = encode(tokenizer, [prompt.text + text for prompt, text in zip(read, texts, strict=True)])
    apart = encode_after(tokenizer, texts)
    stops, found, stopped, template = set(ends(tokenizer)), [], 0, template_of(tokenizer)
    for prompt, both, alone, does_end in zip(read, together, apart, ended, strict=True):
        # A token that reaches over from the prompt into the reply is one that no sampling could have made.
        body = both[len(prompt.bare) :] if both[: len(prompt.bare)] == prompt.bare else alone
        at = next((k for k, token in enumerate(body) if token in stops), len(body))
        stopped += at < len(body)
        behind: list[int] = []
        if does_end:
            behind = [_end(tokenizer, template, prompt)]
            if whole and prompt.template is not None:
                behind += encode(tokenizer, [prompt.template.behind.partition(prompt.template.end)[2]])[0]
        found.append(body[:at] + behind)
    return Tails(found, stopped)


def _behind(tokenizer: Any, prompt: Read, reply: str) -> str:
    """The text behind a prompt, without the token that ends it."""
    if prompt.template is not None:
        assert isinstance(prompt.text, Prompt)
        return prompt.template.reply(prompt.text, reply)
    return without_end(reply, tokenizer.eos_token)


def _end(tokenizer: Any, template: ChatTemplate | None, prompt: Read) -> int:
    """The id that ends a reply: the template's, also where a prompt holds its markers, or else the tokenizer's."""
    if template and (prompt.template or any(marker in prompt.text for marker in template.markers)):
        return tokenizer.convert_tokens_to_ids(template.end)
    return tokenizer.eos_token_id


def _tell_prompts(read: Sequence[Read], rooms: Sequence[int], note: Note | None) -> None:
    cut = {x.text: (len(x.ids), room) for x, room in zip(read, rooms, strict=True) if len(x.ids) > room}
    if cut and note is not None:
        longest, room = max(cut.values())
        note(
            f"{len(cut)} of {len({x.text for x in read})} prompts have more than the {room} tokens that there is room "
            f"for (the longest has {longest}); they lose their beginning, markup of a template included. "
            "Raise max_length if it matters."
        )
