"""Vocabularies of a few hundred tokens, in the two manners of today's tokenizers: bytes, and pieces of words.

Merges are learnt from a few sentences, so that words, double line breaks and signs before a line break are tokens that
may reach over the seam of prompt and reply, as they do in large vocabularies.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = (
    "Hello there. The answer is 4. What is 2 + 2? Why is it so? Yes, it is. No. Hi! Be brief. You are a helpful "
    "assistant. The user asks what the answer is, and the assistant says: It is 4, because 2 + 2 is 4. Thank you."
)
MARKS = "[INST] [/INST] <<SYS>> <|user|> <|assistant|> <|system|> model user system"
BREAKS = "Hi?\n\nNo.\n\nYes.\n<|user|>\nsystem\nuser\nassistant\nmodel\n\n<|assistant|>\n\n\n"
LETTERS = "Größe 你好 été 🙂"  # what a vocabulary without bytes would not know otherwise

# Words take a sign before them with them, and signs take line breaks behind them (Llama 3, Qwen, GLM-4, OLMo 2).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def by_words() -> Any:
    """How Llama 3 and Qwen cut text before bytes are merged."""
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def by_gpt2(*before: Any) -> Any:
    """How GPT-2 does, behind what a family does before."""
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def byte_level(pre: Any, normalizer: Any = None) -> Tokenizer:
    """Merges of bytes; there is no text that it does not know, and no blank that it invents."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    learns = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([SAMPLE, BREAKS], learns)
    return made


@functools.cache
def _pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator([SAMPLE, MARKS] * 2, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    learnt = json.loads(made.to_str())["model"]
    return tuple(learnt["vocab"]), tuple(map(tuple, learnt["merges"]))


def sentence_piece(first: Sequence[str], *, blank: str, breaks: bool = False) -> Tokenizer:
    """Merges of letters, blanks written as ▁, unknown letters as their bytes.

    Args:
        first: The vocabulary begins with these.
        blank: Where a ▁ is put that nobody wrote: "legacy" is before every text between special tokens, "first" is
            before a text that begins with none, "none" is nowhere.
        breaks: Whether line breaks are tokens of their own, and not bytes.
    """
    pieces, merges = _pieces()
    more, pairs = (("\n", "\n\n"), (("\n", "\n"),)) if breaks else ((), ())
    names = [*first, *(f"<0x{i:02X}>" for i in range(256)), *pieces, *more]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab, [*merges, *pairs], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if blank == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if blank == "legacy" else []
        made.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [] if blank == "none" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def unigram(first: Sequence[str]) -> Tokenizer:
    """The likeliest pieces, after NFKC and with a ▁ before every text (XGLM)."""
    words = Counter("▁" + word for word in f"{SAMPLE} {LETTERS}".split())
    letters = Counter(f"{SAMPLE}{LETTERS} :Huma\n".replace(" ", "▁"))
    scores = dict.fromkeys(letters, -20.0) | {name: -8.0 + count for name, count in words.items()}
    vocab = [(name, 0.0) for name in first] + sorted(scores.items())
    made = Tokenizer(models.Unigram(vocab, unk_id=list(first).index("<unk>")))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return made


def finished(
    made: Tokenizer, template: str | None = None, *, extra: Sequence[str | AddedToken] = (), words: Sequence[str] = (),
    before: Sequence[str] = (), behind: Sequence[str] = (), **named: str,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A tokenizer of transformers.

    Args:
        made: With everything but special tokens.
        template: Of chats.
        extra: Special tokens besides those that have a name.
        words: Tokens that are added and are not special: text cannot hide them.
        before: Tokens that begin every text, but those that come from the template.
        behind: Tokens that end every text.
        named: ``bos_token``, ``eos_token``, ``pad_token``, ``unk_token``.
    """
    special = [AddedToken(n, normalized=False, special=True) if isinstance(n, str) else n for n in extra]
    made.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in named.values()])
    made.add_special_tokens(special)
    made.add_tokens([AddedToken(n, normalized=False) for n in words])
    if before or behind:
        names = [(n, made.token_to_id(n)) for n in {*before, *behind}]
        made.post_processor = processors.TemplateProcessing(single=[*before, "$A", *behind], special_tokens=names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, extra_special_tokens=special, clean_up_tokenization_spaces=False, **named
    )
    tokenizer.chat_template = template
    return tokenizer
