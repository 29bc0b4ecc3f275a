"""The tiny model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from trainer.data.encoding import encode_pairs
from trainer.data.tokenizer import decode
from trainer.models.tiny import byte_tokenizer


def test_every_text_survives_the_tiny_tokenizer(tmp_path: Path) -> None:
    texts = ["\n\nHuman: plain", " naïve Ωmega 漢字 \U0001f600\t", "a  b   c<eos>"]
    tokenizer = byte_tokenizer(["only plain english was seen in training"])
    samples = encode_pairs(tokenizer, ["", *texts][1:], texts, 4096)
    assert decode(tokenizer, [s.tokens[s.prompt_length :] for s in samples])[:2] == texts[:2]
    assert all(s.tokens[-1] == tokenizer.eos_token_id for s in samples)
