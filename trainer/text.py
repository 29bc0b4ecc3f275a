"""From strings to token ids and back. Prompt and response are encoded apart and joined as tokens, never as strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.packing import Sample

Note = Callable[[str], None]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], max_length: int, note: Note | None = None
) -> list[list[int]]:
    """Token ids of prompts, cut on the left.

    Args:
        tokenizer: Of the model that will read them.
        prompts: Texts.
        max_length: Tokens per prompt.
        note: Told once how many were cut, if any.

    Raises:
        ValueError: If a prompt has no tokens.
    """
    # Having a begin-of-sequence token and wanting one are two things; the empty text shows what the model was fed.
    start = [t for t in tokenizer("")["input_ids"][:1] if t == tokenizer.bos_token_id]
    # A chat template writes the token itself.
    bare = [ids[1:] if start and ids[:1] == start else ids for ids in encode(tokenizer, prompts)]
    encoded = [start + ids[-max(max_length - len(start), 1) :] for ids in bare]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"data: prompt {prompt!r} has no tokens")
    cut = {prompt: len(ids) for prompt, ids in zip(prompts, bare, strict=True) if len(ids) + len(start) > max_length}
    if cut and note is not None:
        note(
            f"{len(cut)} of {len(set(prompts))} prompts have more than the {max_length} tokens that there is room for "
            f"(the longest has {max(cut.values())}); they lose their beginning. Raise max_length if it matters."
        )
    return encoded


def encode_pairs(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    ended: Sequence[bool] | None = None,
    note: Note | None = None,
) -> list[Sample]:
    """Prompt, response and end-of-sequence token, at most ``max_length`` tokens in all.

    A prompt keeps at most half of the room, from its end; a response that does not fit loses its end and with it the
    end-of-sequence token, because a cut text did not end.

    Args:
        tokenizer: Of the model that will read them.
        prompts: Texts.
        responses: One text per prompt.
        max_length: Tokens per sample.
        ended: Whether each response ended by itself; None is all of them.
        note: Told once how many prompts and how many responses were cut, if any.
    """
    heads, cut = encode_prompts(tokenizer, prompts, max(max_length // 2, 1), note), 0
    samples = []
    for i, (head, body) in enumerate(zip(heads, encode(tokenizer, responses), strict=True)):
        tail = [*body, tokenizer.eos_token_id] if ended is None or ended[i] else body
        cut += len(head) + len(tail) > max_length
        samples.append(Sample((head + tail)[:max_length], len(head)))
    if cut and note is not None:
        note(
            f"{cut} of {len(samples)} responses do not fit into {max_length} tokens behind their prompts; they lose "
            "their end, and with it the end of the sequence."
        )
    return samples


def decode(tokenizer: Any, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens."""
    return tokenizer.batch_decode([list(t) for t in tokens], skip_special_tokens=True)
