"""What `make test-real` does, in seconds and with a small model in the place of a pretrained one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real import commands, mood, topics
from trainer.data import reading as data
from trainer.models.tiny import byte_tokenizer, tiny_policy


def test_every_line_runs(tmp_path: Path) -> None:
    texts = [*commands.ASKED, *commands.RIGHT, *commands.WRONG]
    tiny_policy(byte_tokenizer(texts), 0, hidden=32, layers=1).save(tmp_path / "model")
    commands.data(tmp_path)
    for stage in commands.LINES:
        commands.run(stage, str(tmp_path / "model"), tmp_path, steps=1, tokens=4)
        if stage != "eval":
            assert len(commands.metrics(tmp_path / stage)) == 1
        assert "update" not in commands.alarms(tmp_path / stage)


def test_topics_are_asked_once(tmp_path: Path) -> None:
    assert len(set(topics.TRAIN) | set(topics.HELD_OUT)) == len(topics.TRAIN) + len(topics.HELD_OUT) >= 46
    path = topics.write(tmp_path / "held_out.jsonl", topics.HELD_OUT)
    assert len(data.read(path, "prompts")) == len(topics.HELD_OUT)


@pytest.mark.parametrize(("text", "sign"), [
    ("I love it!", 1), ("What a wonderful, warm day.", 1), ("It is not good.", -1), ("It was awful.", -1),
    ("It is a table.", 0), ("", 0), ("Don\N{RIGHT SINGLE QUOTATION MARK}t worry.", 1),
])  # fmt: skip
def test_moods(text: str, sign: int) -> None:
    found = mood.positive(["p"], [text], [{}])[0]
    assert (found > 0) - (found < 0) == sign
    assert -1 <= found <= 1
