"""Reading data: every accepted shape, every kind of broken file, and the counting of lines that are left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from trainer.data import reading as data

GOOD = {"prompt": "2 + 2?", "response": "4"}
USER, REPLY = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the folder with real data is not there")


@pytest.fixture
def notes():
    return []


def test_a_chat_template_renders_conversations_instead(write):
    path = write({"messages": [{"role": "system", "content": "Be kind."}, USER, REPLY]})
    (ours,) = data.read(path, "demonstrations")
    (theirs,) = data.read(path, "demonstrations", render=lambda m: "|".join(x["content"] for x in m) + ">")
    assert ours == {"prompt": "Be kind.\n\nHuman: Hi?\n\nAssistant:", "response": " Hello."}
    assert theirs == {"prompt": "Be kind.|Hi?>", "response": "Hello."}


def test_one_per_cent_may_be_bad_and_no_more(write, notes):
    lines = ["oops"] * 2 + [GOOD] * 198
    assert len(data.read(write(*lines), "demonstrations", note=notes.append)) == 198
    assert "2 of 200 lines are bad (1.00%)" in notes[0]
    with pytest.raises(ValueError, match="3 of 200 lines are bad"):
        data.read(write("oops", *lines[:-1]), "demonstrations", note=notes.append)
    assert len(notes) == 1


def test_only_the_first_five_bad_lines_are_shown(write):
    with pytest.raises(ValueError, match="line 6") as error:
        data.read(write(GOOD, *["oops"] * 7), "demonstrations")
    assert "line 7" not in str(error.value)
    assert "and 2 more" in str(error.value)


def test_lines_with_nothing_to_teach_are_counted_apart(write, notes):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [pair, pair | {"chosen": " "}, pair | {"rejected": "a"}, pair | {"chosen": ""}]
    tied = {"prompt": "p", "responses": ["a", "b"], "correct": [True, True]}
    twice = {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [0, 1, 1]}
    assert len(data.read(write(*rows, tied, twice), "ranked", note=notes.append)) == 1
    (note,) = notes
    assert "5 of 6 lines are well-formed but left out" in note
    assert "2 with an empty reply" in note
    assert "lines 2, 4" in note
    assert "2 with identical replies" in note
    assert "1 with the same rank for every reply" in note


def test_repeated_replies_of_equal_rank_are_fine(write):
    row = {"prompt": "p", "responses": ["a", "a", "b"], "correct": [True, True, False]}
    assert len(data.read(write(row), "ranked")) == 1


def test_nothing_left_is_an_error(write, notes):
    with pytest.raises(ValueError, match="all 1 lines are unusable"):
        data.read(write({"prompt": "p", "response": ""}), "demonstrations", note=notes.append)
    with pytest.raises(ValueError, match="it is blank"):
        data.read(write("", " "), "demonstrations")
    with pytest.raises(ValueError, match="kind: got 'pairs'"):
        data.read(write(GOOD), "pairs")  # pyright: ignore[reportArgumentType]


@needs_real_data
def test_real_files(notes):
    pairs = data.read(REAL / "hh_harmless_base.jsonl.gz", "ranked", note=notes.append)
    assert len(pairs) == 1996
    assert "4 with an empty reply" in notes[0]
    assert all(pair["prompt"].endswith("\n\nAssistant:") for pair in pairs)
    with gzip.open(REAL / "hh_harmless_base.jsonl.gz", "rt", encoding="utf-8") as file:
        first = json.loads(next(file))
    assert pairs[0]["prompt"] + pairs[0]["responses"][0] == first["chosen"]
    assert len(data.read(REAL / "hh_harmless_base.jsonl.gz", "demonstrations", note=notes.append)) == 1996
    assert len(data.read(REAL / "gsm8k_ranked.jsonl.gz", "ranked", note=notes.append)) == 551
    prompts = data.read(REAL / "gsm8k_train.jsonl.gz", "prompts")
    assert len(prompts) == 7473
    assert prompts[0]["extra"]["answer"].endswith("#### 72")
