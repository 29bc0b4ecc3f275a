"""Tokenizers: which read alike, and where a response has no end."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tests.families import tokenizer
from tests.support.small import small_policy
from trainer.data.encoding import encode_pairs
from trainer.data.tokenizer import decode


def test_tokenizers_that_read_alike_are_told_from_those_that_only_share_words(tmp_path: Path):
    from trainer.data.tokenizer import same

    assert same(tokenizer("smollm2"), tokenizer("smollm2"))
    tokenizer("smollm2").save_pretrained(tmp_path)
    twin = AutoTokenizer.from_pretrained(tmp_path)
    assert same(tokenizer("smollm2"), twin)
    twin.chat_template = None
    assert not same(tokenizer("smollm2"), twin)


def test_a_cut_response_has_no_end() -> None:
    tokenizer = small_policy().tokenizer
    (sample,) = encode_pairs(tokenizer, ["a b c d e f"], ["g h i j k l"], 8)
    assert decode(tokenizer, [sample.tokens]) == ["c d e f g h i j"]
    assert sample.prompt_length == 4
