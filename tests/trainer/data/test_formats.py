"""Every accepted shape of a record, and why others are refused."""

from __future__ import annotations

import json

import pytest

from tests.trainer.data.test_reading import REPLY, USER
from trainer.data import reading as data

GOOD = {"prompt": "2 + 2?", "response": "4"}

HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go away."}


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        (GOOD, "2 + 2?", "4"),
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"instruction": "add", "input": "1 and 2", "output": "3"}, "add\n\n1 and 2", "3"),
        ({"instruction": "add", "input": "", "output": "3"}, "add", "3"),
        (HH, "\n\nHuman: Hi?\n\nAssistant:", " Hello."),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
        ({"text": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}, None, " d"),
        ({"messages": [USER, REPLY]}, "\n\nHuman: Hi?\n\nAssistant:", " Hello."),
        ({"prompt": [USER], "completion": [REPLY]}, "\n\nHuman: Hi?\n\nAssistant:", " Hello."),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_demonstrations(write, row, prompt, response):
    (record,) = data.read(write(row), "demonstrations")
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:" if prompt is None else prompt
    assert record == {"prompt": prompt, "response": response}


@pytest.mark.parametrize(
    ("row", "prompt", "responses", "ranks"),
    [
        (HH, "\n\nHuman: Hi?\n\nAssistant:", [" Hello.", " Go away."], [0, 1]),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", ["c", "r"], [0, 1]),
        ({"question": "p", "responses": ["a", "b", "c"], "ranks": [2, 0, 2]}, "p", ["a", "b", "c"], [2, 0, 2]),
        ({"prompt": "p", "responses": ["a", "b"], "correct": [False, True]}, "p", ["a", "b"], [1, 0]),
        (
            {"prompt": "Hi?", "chosen": [USER, REPLY], "rejected": [USER, REPLY | {"content": "No."}]},
            "\n\nHuman: Hi?\n\nAssistant:", [" Hello.", " No."], [0, 1],
        ),
        (
            {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY | {"content": "No."}]},
            "\n\nHuman: Hi?\n\nAssistant:", [" Hello.", " No."], [0, 1],
        ),
    ],
)  # fmt: skip
def test_ranked(write, row, prompt, responses, ranks):
    assert data.read(write(row), "ranked") == [{"prompt": prompt, "responses": responses, "ranks": ranks}]


def test_transcripts_part_where_they_begin_to_differ(write):
    # The sides have different numbers of turns: the last *common* assistant turn counts, not the last of each.
    shared = "\n\nHuman: a\n\nAssistant:"
    row = {"chosen": shared + " b\n\nHuman: c\n\nAssistant: d", "rejected": shared + " e"}
    (record,) = data.read(write(row), "ranked")
    assert record["prompt"] == shared
    assert record["responses"] == [" b\n\nHuman: c\n\nAssistant: d", " e"]


@pytest.mark.parametrize(
    ("row", "prompt", "extra"),
    [
        ({"question": "q", "answer": "#### 4"}, "q", {"answer": "#### 4"}),
        ({"prompt": "p", "id": 7}, "p", {"id": 7}),
        ({"messages": [USER, REPLY], "topic": "t"}, "\n\nHuman: Hi?\n\nAssistant:", {"topic": "t"}),
        (HH, "\n\nHuman: Hi?\n\nAssistant:", {}),
    ],
)
def test_prompts_keep_the_other_fields(write, row, prompt, extra):
    assert data.read(write(row), "prompts") == [{"prompt": prompt, "extra": extra}]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("demonstrations", "{not json", "invalid JSON"),
        ("demonstrations", "17", "want a JSON object, got int"),
        ("demonstrations", {"promt": "p", "response": "r"}, "no prompt.*found promt, response"),
        ("demonstrations", {"prompt": "p"}, "no response"),
        ("demonstrations", {"prompt": 3, "response": "r"}, "prompt must be text, got a number"),
        ("demonstrations", {"prompt": "p", "response": None}, "no response.*found prompt\\n"),
        ("demonstrations", {"prompt": " ", "response": "r"}, "prompt is empty"),
        ("demonstrations", {"messages": [USER]}, "must end with an assistant's reply"),
        ("demonstrations", {"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ("ranked", {"chosen": "a", "rejected": "b"}, "no prompt field"),
        ("ranked", {"prompt": "p", "chosen": "a"}, "no rejected"),
        ("ranked", {"prompt": "p", "responses": ["a", "b"]}, "no ranks"),
        ("ranked", {"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "2 responses but 1 ranks"),
        ("ranked", {"prompt": "p", "responses": ["a", "b"], "ranks": [0, True]}, "finite numbers"),
        ("ranked", '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, NaN]}', "finite numbers"),
        ("ranked", {"prompt": "p", "responses": ["a"], "ranks": [0]}, "two or more"),
        ("ranked", {"prompt": "p", "responses": ["a", "b"], "correct": ["yes", "no"]}, "true and false"),
        ("prompts", {"text": "t"}, "no prompt"),
    ],
)
def test_bad_lines_say_why(write, kind, row, reason):
    with pytest.raises(ValueError, match=rf"(?s)1 of 1 lines is bad .*line 1: .*(?:{reason})"):
        data.read(write(row), kind)


def test_harmless_oddities_are_read(tmp_path):
    line = json.dumps({"prompt": "é", "response": "ü"}, ensure_ascii=False).encode()
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert data.read(path, "demonstrations") == [{"prompt": "é", "response": "ü"}] * 2
