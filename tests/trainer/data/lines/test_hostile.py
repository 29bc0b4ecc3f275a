"""Data that is broken, huge or meant to do harm: one line says what and where, and nothing is lost or exhausted."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.support.small import small_policy, write
from trainer.cli import pipeline
from trainer.cli import program as cli
from trainer.data import lines as data_lines
from trainer.data import reading as data
from trainer.data.lines import rows
from trainer.evaluation import alignment_tax
from trainer.inspect.rows import read as inspected
from trainer.monitors import probes
from trainer.monitors.monitor import Alarm
from trainer.report import page as report
from trainer.run import folder as run_folder
from trainer.run import log
from trainer.stages import split
from trainer.stages.rl import watch

GOOD = b'{"prompt": "a", "response": "b"}\n'
ODD = [*"\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\x1f\x00\r\n\ud800\udfff", "\r\n"]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_texts_with_any_character_survive(tmp_path: Path, odd: str) -> None:
    """In the log, in the report, and in what a pipeline gathers from its stages; alarms and summaries likewise."""
    run = log.RunLog(tmp_path / "sft", quiet=True)
    run.samples("t", [{"prompt": f"p{odd}q", "after": f"a{odd}b"}, {"prompt": "plain", "after": "c"}])
    run.summary({"said": f"x{odd}y", "verdicts": []})
    watch.write(run.out_dir, "sft", Alarm("n", 1, 1, f"m{odd}"))
    pipeline.gather(tmp_path, [pipeline.Work("sft", "sft", None, split.SplitConfig(data=tmp_path, out=run.out_dir))])
    for folder in (run.out_dir, tmp_path):
        found = log.records(folder / run_folder.SAMPLES)
        assert [(r["prompt"], r["after"]) for r in found] == [(f"p{odd}q", f"a{odd}b"), ("plain", "c")]
        assert watch.raised(folder)[0]["message"] == f"m{odd}"
        assert report.write(folder).read_bytes().count(b"<article>") == 2
    assert json.loads((run.out_dir / run_folder.SUMMARY).read_bytes())["said"] == f"x{odd}y"


BAD: list[tuple[bytes, str]] = [
    (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "a number of more than 4300 digits"),
    (b'{"prompt": "a", "n": [[-' + b"9" * 5000 + b"]]}", "a number of more than 4300 digits"),
    (b'{"prompt": ' + b"[" * 100_000, "invalid JSON (nested too deeply)"),
    (b'{"prompt": "a", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "invalid JSON (nested too deeply)"),
    (b'{"prompt": "a\\ud800b"}', r"half a surrogate pair (\ud800)"),
    (b'{"prompt": "a", "x": [{"\\uDfffb": 1}]}', r"half a surrogate pair (\udfff)"),
    (b'{"prompt": "\x00"}', "invalid JSON (Invalid control character"),
    (b"\x00" * 4096, "invalid JSON"),
    (b'{"prompt": "\xe9"}', "not UTF-8 (byte 12 of the line)"),
    (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    (b'{"prompt": "a", "x": [{"y": 1, "y": 1}]}', "'y' stands twice"),
    (b"NaN", "want a JSON object, got float"),
    (b'{"prompt": "a"} {"prompt": "b"}', "invalid JSON (Extra data"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[f"{i}-{reason[:24]}" for i, (_, reason) in enumerate(BAD)])
def test_a_bad_line_has_its_number_whoever_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    texts = GOOD.replace(b"prompt", b"text") * 150
    (path := tmp_path / "d.jsonl").write_bytes(GOOD * 150 + line + b"\n" + GOOD * 150)
    (plain := tmp_path / "t.jsonl").write_bytes(texts + line + b"\n" + texts)
    told: list[str] = []
    assert len(data.read(path, "demonstrations", note=told.append)) == 300
    assert len(told) == 1
    assert f"{path}: 1 of 301 lines is bad (0.33%):\n  line 151: {reason}" in told[0]
    ((number, why),) = inspected(path).bad
    assert (number, reason in why) == (151, True)
    assert len(alignment_tax.held_out_texts(plain, small_policy().tokenizer, 64)) == 0  # one token each
    assert f"{plain}: 1 of 301 lines is bad (0.33%):\n  line 151: {reason}" in capsys.readouterr().err
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="line 2: "):
        probes.read_probes(path)
    with pytest.raises(ValueError, match=r"(?s)1 of 1 lines is bad .*line 2: "):
        data.read(path, "prompts")


FINE: list[tuple[bytes, Any]] = [
    (b'\xef\xbb\xbf{"prompt": "a"}', {"prompt": "a"}),  # also where two files were put together
    (b'{"prompt": "\\u0000\\u2028"}', {"prompt": "\0\u2028"}),
    (b'{"prompt": "\\ud83d\\ude00"}', {"prompt": "\U0001f600"}),
    (b'{"prompt": "\\\\ud800"}', {"prompt": "\\ud800"}),
    (b'{"prompt": "a", "n": ' + b"9" * 400 + b"}", {"prompt": "a", "n": 10**400 - 1}),
    (b'{"prompt": "a", "n": [1e999, -Infinity]}', {"prompt": "a", "n": [float("inf"), float("-inf")]}),
    (b'{"prompt": "a"}\r', {"prompt": "a"}),
]


def test_what_python_can_read_and_write_is_no_bad_line(tmp_path: Path) -> None:
    """And `split` writes it so that it is read again."""
    (path := tmp_path / "d.jsonl").write_bytes(b"".join(line + b"\n" for line, _ in FINE))
    assert list(rows(path)) == [(i, row) for i, (_, row) in enumerate(FINE, start=1)]
    numbered = [{"prompt": f"{i}", "x": row} for i, (_, row) in enumerate(FINE)]
    write(path, numbered)
    split.split(split.SplitConfig(data=path, out=tmp_path, held_out=0.5, quiet=True))
    again = [row for name in (split.TRAIN, split.HELD_OUT) for _, row in rows(tmp_path / name)]
    assert sorted(again, key=str) == sorted(numbered, key=str)


@pytest.mark.parametrize("rank", ["1e999", "NaN", "9" * 400, "-" + "9" * 400, "true"])
def test_a_number_that_no_float_can_hold_is_no_rank(tmp_path: Path, rank: str) -> None:
    (path := tmp_path / "d.jsonl").write_text(f'{{"prompt": "p", "responses": ["a", "b"], "ranks": [0, {rank}]}}\n')
    with pytest.raises(ValueError, match="line 1: ranks must be a list of finite numbers"):
        data.read(path, "ranked")
    path.write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
        f'{{"prompt": "p", "chosen": "a", "rejected": "b", "annotations": {{"ann": [0, {rank}]}}}}\n'
    )
    assert [number for number, _ in inspected(path).bad] == ([2] if rank != "true" else [])
    path.write_text(f'{{"probe": [1], "pattern": {rank}}}\n')
    with pytest.raises(ValueError, match="line 1: want an object with probe"):
        probes.read_probes(path)


def packed(path: Path, block: bytes, times: int, first: bytes = b"") -> Path:
    """A gzip file of as many members: gigabytes cost no time to write."""
    member = gzip.compress(block)
    path.write_bytes(gzip.compress(first + GOOD) + member * times)
    return path


BLOCK = 1 << 24
BOMBS: dict[str, tuple[bytes, int, str]] = {
    "one line of 4 GB": (b"x" * BLOCK, 256, "line 2 has more than 64 MiB"),
    "4 GB of blanks": (b" " * BLOCK, 256, "line 2 has more than 64 MiB"),
    "a text without end": (b'"' + b"x" * BLOCK, 256, "line 2 has more than 64 MiB"),
    "line feeds without end": (b"\n" * BLOCK, 256, "there is nothing but 256 KiB of blank lines"),
    "Windows line ends": (b" \r\n" * (BLOCK // 3), 256, "there is nothing but 256 KiB of blank lines"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_file_exhausts_memory_or_time(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    block, times, reason = BOMBS[name]
    path = packed(tmp_path / "d.jsonl.gz", block, times)
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as error:
            list(rows(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(error.value).count("\n") == 0
    assert str(path) in str(error.value)
    assert peak < 3 * data_lines.LONGEST
    assert time.monotonic() - began < 10  # on a busy machine; alone it is a fraction of a second
    assert cli.main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_many_names_cost_no_time_and_long_ones_no_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A minute for a line of 650 KB, if each name is looked for among all."""
    names = ", ".join(f'"k{i}": 0' for i in range(60_000))
    (path := tmp_path / "d.jsonl").write_text(f'{{{names}, "last": 1, "last": 2}}\n')
    began = time.monotonic()
    assert str(dict(rows(path))[1]) == "'last' stands twice"
    assert time.monotonic() - began < 5
    for text in (f"{{{names}}}\n", json.dumps({"n" * 5_000_000: 1, "x": 2}) + "\n"):
        path.write_text(text)
        for argv in (["sft", "--data", str(path), "--out", str(tmp_path / "out")], ["inspect", str(path)]):
            assert cli.main(argv) == 2
            assert "found " in (said := capsys.readouterr().err)
            assert "..." in said
            assert len(said) < 1000


def test_lines_up_to_the_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_lines, "LONGEST", 100)
    monkeypatch.setattr(data_lines, "BLANK", 50)
    whole = GOOD.rstrip() + b" " * (100 - len(GOOD)) + b"\n"
    assert len(whole) == 100
    for text, wanted in (
        (whole, 1), (whole.rstrip(b"\n") + b" ", 1), (GOOD + b"\n" * 50 + GOOD, 2),
        (b" " + whole, None), (whole * 3 + b" " + whole, None), (GOOD + b"\n" * 51 + GOOD, None),
    ):  # fmt: skip
        for name, contents in (("d.jsonl", text), ("d.jsonl.gz", gzip.compress(text))):
            (path := tmp_path / name).write_bytes(contents)
            if wanted is None:
                with pytest.raises(ValueError, match=r"line \d+ "):
                    list(rows(path))
            else:
                assert len(list(rows(path))) == wanted


def test_bad_lines_beyond_number_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a megabyte of gzip holds a hundred million of them."""
    monkeypatch.setattr(data_lines, "HOPELESS", 1000)
    path = packed(tmp_path / "d.jsonl.gz", b"x\n" * (BLOCK // 2), 64)
    with pytest.raises(ValueError, match=r"is no data: 1000 lines hold no JSON object; line 1002: invalid JSON"):
        data.read(path, "prompts")
    path.write_bytes(gzip.compress(b"{}\n" * 20_000))  # objects, of which nobody can say so
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="20000 of 20000 lines are bad") as error:
            data.read(path, "prompts")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(error.value).count("\n  line ") == data.SHOWN
    assert peak < 1 << 20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is read once only: what was hashed would be gone when it is read."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "pipe.jsonl")
    read, wrote = os.pipe()
    names = [str(tmp_path / "pipe.jsonl"), str(tmp_path / "link.jsonl"), f"/dev/fd/{read}", os.devnull]

    def told() -> None:
        for name in names:
            for argv in (["inspect", name], ["sft", "--data", name, "--out", str(tmp_path / "out")]):
                assert cli.main(argv) == 2
                assert f"{name} is a pipe or a device" in (error := capsys.readouterr().err)
                assert error.count("\n") == 1

    try:
        waiting = threading.Thread(target=told, daemon=True)
        waiting.start()
        waiting.join(20)
        assert not waiting.is_alive(), "somebody waits for the other end"
    finally:
        os.close(read)
        os.close(wrote)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", ["bad text", "a date that Python has not", "a row too large"])
def test_a_bad_row_of_parquet_has_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(data_lines, "PARQUET_ROWS", 8)
    texts: list[Any] = [b"b"] * 200
    times = [0] * 200
    if odd == "bad text":
        texts[150] = b"\xff"
    elif odd == "a row too large":
        monkeypatch.setattr(data_lines, "LONGEST", 1000)
        texts[150] = b"x" * 2000
    else:
        times[150] = 2**40
    table = {
        "prompt": ["a"] * 200, "response": pa.array(texts, pa.binary()).view(pa.string()),
        "at": pa.array(times, pa.timestamp("s")),
    }  # fmt: skip
    parquet.write_table(pa.table(table), path := tmp_path / "d.parquet")
    told: list[str] = []
    if odd == "a row too large":
        with pytest.raises(ValueError, match="row 151 has more than"):
            data.read(path, "demonstrations")
        return
    assert len(data.read(path, "demonstrations", note=told.append)) == 199
    assert "1 of 200 lines is bad (0.50%):\n  line 151: a value that Python has not" in told[0]
