"""Numbered rows out of a data file, and one clear sentence when the file is not what its name says."""

from __future__ import annotations

import codecs
import difflib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

GZIP, PARQUET, ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
LFS_POINTER = b"version https://git-lfs"
LONGEST = 1 << 26
"""Bytes of one line, unpacked: a pair of replies of a million tokens each is a quarter of it."""
BLANK = 1 << 18
"""Bytes of blank lines in a row: half a megabyte of gzip may hold a billion of them."""
HOPELESS = 1_000_000
"""Lines that are no JSON object; such a file is something else, and its errors alone would fill the memory."""
PARQUET_ROWS = 1024
"""Rows of a parquet file in memory together, beside those that were made records."""
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # This may be half a surrogate pair.
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields `(line number from 1, object)`; a line that holds no JSON object yields a ValueError that says why.

    Reads jsonl, plain or gzipped (told apart by content, not by name), and parquet where pyarrow is installed. Blank
    lines, Windows line ends and a UTF-8 byte-order mark are harmless and skipped.

    A field of a line that is null is left out, as if it were not there: where lines of several schemas lie in one
    parquet file, each has the fields of all of them. Times lose what is less than a microsecond.

    Some lines are JSON and yet nothing can be done with them: a name stands twice in an object, a number has more than
    4300 digits, a text holds half a surrogate pair. NaN and Infinity, which Python writes, are read; who wants a number
    refuses them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read as data at all; the message says what it is and what to do.
    """
    path = existing(Path(path))
    with path.open("rb") as file:
        head = _peek(file)
        _explain(path, head, named_gzip=path.suffix == ".gz")
        reads = _parquet_rows if head.startswith(PARQUET) else _json_rows
        for number, row in reads(path, file):
            yield number, _without_nulls(row)


def _without_nulls(row: Any) -> Any:
    return {name: x for name, x in row.items() if x is not None} if isinstance(row, dict) else row


def _json_rows(path: Path, raw: Any) -> Iterator[tuple[int, Any]]:
    number = bad = 0
    with io.BufferedReader(gzip.GzipFile(fileobj=raw)) if _peek(raw).startswith(GZIP) else nullcontext(raw) as file:
        try:
            _explain(path, _peek(file), named_gzip=False)
            for number, line in _lines(path, file):
                row = _parse(line.removeprefix(codecs.BOM_UTF8))
                yield number, row
                bad += isinstance(row, ValueError)
                if bad > HOPELESS:
                    raise ValueError(f"{path} is no data: {HOPELESS} lines hold no JSON object; line {number}: {row}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is a damaged gzip file (good up to line {number}: {error}); it was probably cut short while "
                "downloading or copying: fetch it again"
            ) from None


def _lines(path: Path, file: Any) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; never more of one than `LONGEST` in memory."""
    number = blank = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise ValueError(f"{path}: line {number} has more than {LONGEST >> 20} MiB, want one record a line")
        blank = blank + len(line) if line.isspace() else 0
        if blank > BLANK:
            raise ValueError(f"{path}: up to line {number} there is nothing but {BLANK >> 10} KiB of blank lines")
        if not blank:
            yield number, line


def _peek(file: Any) -> bytes:
    """The first bytes without consuming them."""
    return file.peek(64)[:64]


def _parse(line: bytes) -> Any:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
        if b"\\u" in line and HALF.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start} of the line)")
    except UnicodeEncodeError as error:
        return ValueError(f"half a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no character")
    except json.JSONDecodeError as error:
        return ValueError(f"invalid JSON ({error.msg} at column {error.colno})")
    except _Twice as error:
        return ValueError(str(error))
    except ValueError:
        return ValueError("a number of more than 4300 digits")  # sys.set_int_max_str_digits
    except RecursionError:
        return ValueError("invalid JSON (nested too deeply)")
    return row if isinstance(row, dict) else ValueError(f"want a JSON object, got {type(row).__name__}")


class _Twice(ValueError):
    """A name stands twice in one object: which of its values is meant?"""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(name for name, _ in pairs)
        raise _Twice(f"{next(name for name in times if times[name] > 1)!r:.60} stands twice")
    return found


def _parquet_rows(path: Path, raw: Any) -> Iterator[tuple[int, Any]]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"{path} is a parquet file, and reading those needs pyarrow: pip install pyarrow (or convert it to jsonl)"
        ) from None
    try:
        with parquet.ParquetFile(raw) as file:
            before, names = 0, file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: {max(names, key=names.count)!r:.60} is the name of two columns, want one")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                yield from enumerate(_batch_rows(path, _micro(pyarrow, batch), before), start=before + 1)
                before += batch.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is a damaged parquet file ({error}); fetch it again") from None


def _micro(pa: Any, batch: Any) -> Any:
    """The same with times in microseconds; Python has no nanoseconds, which pandas writes."""
    for i, field in enumerate(batch.schema):
        if getattr(field.type, "unit", None) == "ns":
            zoned = pa.types.is_timestamp(field.type)
            kind = pa.timestamp("us", field.type.tz) if zoned else getattr(pa, str(field.type).partition("[")[0])("us")
            batch = batch.set_column(i, field.name, batch.column(i).cast(kind, safe=False))
    return batch


def _batch_rows(path: Path, batch: Any, before: int) -> Iterator[Any]:
    """Rows of a part of a parquet file; one by one where there is something wrong with any of them."""
    if batch.nbytes <= LONGEST:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):
            rows = None
        if rows is not None:
            yield from rows
            return
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        if one.nbytes > LONGEST:
            raise ValueError(f"{path}: row {before + i + 1} has more than {LONGEST >> 20} MiB")
        try:
            yield one.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield ValueError(f"a value that Python has not ({error})")


def existing(path: Path) -> Path:
    """`path` if it can be opened; otherwise the error that helps most."""
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if ".jsonl" in p.name or p.suffix == ".parquet")
        raise ValueError(f"{path} is a folder: name one file in it" + (f", e.g. {path / files[0]}" if files else ""))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, and data is read more than once: write it to a file first")
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
