"""Files that hold rows, whatever they are called, and what is said of those that hold none."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from trainer.data import reading as data

GOOD = {"prompt": "2 + 2?", "response": "4"}


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
