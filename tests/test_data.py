"""Reading data: every accepted shape, every kind of broken file, and the counting of lines that are left out."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from trainer import data

HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go away."}
GOOD = {"prompt": "2 + 2?", "response": "4"}
USER, REPLY = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the folder with real data is not there")


@pytest.fixture
def write(tmp_path):
    """Writes records (or raw lines) to a jsonl file."""

    def writer(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return writer


@pytest.fixture
def notes():
    return []


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


def test_a_chat_template_renders_conversations_instead(write):
    path = write({"messages": [{"role": "system", "content": "Be kind."}, USER, REPLY]})
    (ours,) = data.read(path, "demonstrations")
    (theirs,) = data.read(path, "demonstrations", render=lambda m: "|".join(x["content"] for x in m) + ">")
    assert ours == {"prompt": "Be kind.\n\nHuman: Hi?\n\nAssistant:", "response": " Hello."}
    assert theirs == {"prompt": "Be kind.|Hi?>", "response": "Hello."}


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


def test_harmless_oddities_are_read(tmp_path):
    line = json.dumps({"prompt": "é", "response": "ü"}, ensure_ascii=False).encode()
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert data.read(path, "demonstrations") == [{"prompt": "é", "response": "ü"}] * 2


def test_gzip_is_known_by_content(tmp_path):
    packed = gzip.compress(json.dumps(GOOD).encode())
    for name in ("a.jsonl.gz", "b.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert data.read(tmp_path / name, "demonstrations") == [GOOD]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("a.jsonl.gz", b'{"prompt": "p", "response": "r"}', "not a gzip file.*rename it to a.jsonl"),
        ("a.jsonl.gz", gzip.compress(bytes(range(256)) * 99)[:200], "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'[{"prompt": "p"}]', "one JSON array"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"\n<!DOCTYPE html><html>", "web page"),
        ("a.jsonl", b"PK\x03\x04rest", "zip archive"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "not UTF-8"),
    ],
)
def test_what_is_not_data_is_explained(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){name}.*{reason}"):
        data.read(tmp_path / name, "demonstrations")


def test_wrong_paths_are_explained(tmp_path, write):
    path = write(GOOD, name="pairs.jsonl")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*pairs\.jsonl"):
        data.read(tmp_path / "pair.jsonl", "ranked")
    with pytest.raises(ValueError, match=r"is a folder: name one file in it, e\.g\. .*pairs\.jsonl"):
        data.read(path.parent, "ranked")


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and so on")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        data.read(path, "demonstrations")
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([GOOD]), path)
    assert data.read(path, "demonstrations") == [GOOD]


def test_sha256_names_the_file(write):
    path = write(GOOD)
    before = data.sha256(path)
    assert len(before) == 64
    assert before == data.sha256(path)
    path.write_text(path.read_text() + "\n")
    assert data.sha256(path) != before


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
