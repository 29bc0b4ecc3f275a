"""What a tokenizer does: token ids of a text, what it puts before a text, which ids exist, which are markers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PROBE, LINE = "a", "\n"


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without what the tokenizer puts around a text."""
    return tokenizer([str(t) for t in texts], add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_after(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that stand behind others.

    Tokenizers of SentencePiece's kind put a blank before a text, which does not belong in the middle of one. Behind
    the end of a line they put none.
    """
    alone = encode(tokenizer, texts)
    (line,), (probe,) = encode(tokenizer, [LINE]), encode(tokenizer, [LINE + PROBE])
    if probe == line + encode(tokenizer, [PROBE])[0]:
        return alone
    behind = encode(tokenizer, [LINE + text for text in texts])
    return [b[len(line) :] if b[: len(line)] == line else a for a, b in zip(alone, behind, strict=True)]


def prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: a begin-of-sequence token, two tokens, or nothing.

    Having such a token and wanting one are two things; a text shows what the model was fed.
    """
    (bare,), full = encode(tokenizer, [PROBE]), list(tokenizer(PROBE)["input_ids"])
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:at]


def known(tokenizer: Any) -> int:
    """One more than the largest id of a token: a head may be padded with rows beyond it, which are no tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def markers(tokenizer: Any) -> list[str]:
    """Special tokens as text: inside of a message each would end or open a turn wherever it stands."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens))


def without_end(text: str, *ends: str | None) -> str:
    """A reply without the token that ends it, which people write into their data now and then.

    >>> without_end("It is 4.<eos>\\n", "<eos>"), without_end("It is 4. ", "<eos>", None)
    ('It is 4.', 'It is 4. ')
    """
    for end in ends:
        if end and text.rstrip().endswith(end):
            return text.rstrip().removesuffix(end)
    return text


def same(a: Any, b: Any) -> bool:
    """Whether two tokenizers give equal ids, equal prefixes and equal prompts of a conversation."""
    return a is b or (
        a.get_vocab() == b.get_vocab()
        and prefix(a) == prefix(b)
        and getattr(a, "chat_template", None) == getattr(b, "chat_template", None)
        and a.eos_token_id == b.eos_token_id
    )


def decode(tokenizer: Any, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens."""
    # The clean-up of some tokenizers, for English of long ago, takes blanks out that the model has written.
    return tokenizer.batch_decode(
        [list(t) for t in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
