"""Numbered rows out of a data file, and one clear sentence when the file is not what its name says."""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

GZIP, PARQUET, ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
LFS_POINTER = b"version https://git-lfs"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def sha256(path: str | Path) -> str:
    """Hex digest of the file as it lies on disk; it names the data in a run folder.

    Args:
        path: Any file.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder.
    """
    with _existing(Path(path)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields `(line number from 1, parsed line)`; a line that cannot be parsed yields its ValueError instead.

    Reads jsonl, plain or gzipped (told apart by content, not by name), and parquet where pyarrow is installed. Blank
    lines, Windows line ends and a UTF-8 byte-order mark are harmless and skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read as data at all; the message says what it is and what to do.
    """
    path = _existing(Path(path))
    with path.open("rb") as file:
        head = file.read(64)
    _explain(path, head, named_gzip=path.suffix == ".gz")
    if head.startswith(PARQUET):
        return _parquet_rows(path)
    return _json_rows(path, packed=head.startswith(GZIP))


def _json_rows(path: Path, *, packed: bool) -> Iterator[tuple[int, Any]]:
    number = 0
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        try:
            _explain(path, _peek(file), named_gzip=False)
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, _parse(text)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is a damaged gzip file (good up to line {number}: {error}); it was probably cut short while "
                "downloading or copying: fetch it again"
            ) from None


def _peek(file: Any) -> bytes:
    """The first bytes without consuming them; the gzip and the plain reader both know `peek`."""
    return file.peek(64)[:64]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return ValueError(f"invalid JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return ValueError("invalid JSON (nested too deeply)")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"{path} is a parquet file, and reading those needs pyarrow: pip install pyarrow (or convert it to jsonl)"
        ) from None
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is a damaged parquet file ({error}); fetch it again") from None
    return iter(enumerate(table.to_pylist(), start=1))


def _existing(path: Path) -> Path:
    """`path` if it can be opened; otherwise the error that helps most."""
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if ".jsonl" in p.name or p.suffix == ".parquet")
        raise ValueError(f"{path} is a folder: name one file in it" + (f", e.g. {path / files[0]}" if files else ""))
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f" (looked from {Path.cwd()})"
        raise FileNotFoundError(f"{path} does not exist{hint}")
    return path


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


def _explain(path: Path, head: bytes, *, named_gzip: bool) -> None:
    """Raises where the first bytes show that these are not lines of JSON.

    Args:
        path: For the message.
        head: The first bytes, of the file or of what was unpacked from it.
        named_gzip: The name promises gzip, so anything else in `head` is an error.
    """
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(LFS_POINTER):
        problem = "is a Git LFS pointer, not the data itself: run `git lfs install && git lfs pull` where it was cloned"
    elif head.startswith(UTF16):
        problem = f"is UTF-16 text, and we read UTF-8: iconv -f UTF-16 -t UTF-8 {path.name} > utf8.jsonl"
    elif not head:
        problem = "is empty"
    elif start[:9].lower().startswith((b"<!doctype", b"<html")):
        problem = "is a web page, not data: the download link probably led to a preview or a log-in page"
    elif head.startswith(ZIP):
        problem = "is a zip archive: unpack it and name the jsonl file inside"
    elif named_gzip and not head.startswith(GZIP):
        problem = f"is named .gz but is not a gzip file: if it is plain jsonl, rename it to {path.stem}"
    elif start.startswith(b"["):
        problem = f"is one JSON array, and we want one object per line: jq -c '.[]' {path.name} > lines.jsonl"
    else:
        return
    raise ValueError(f"{path} {problem}")
