"""The fingerprint of a data file."""

from __future__ import annotations

import os
import time

from trainer.data import hashing

GOOD = {"prompt": "2 + 2?", "response": "4"}


def test_sha256_names_the_file(write):
    path = write(GOOD)
    before = hashing.sha256(path)
    assert len(before) == 64
    assert before == hashing.sha256(path)
    path.write_text(path.read_text() + "\n")
    assert hashing.sha256(path) != before


def test_a_file_is_read_once_until_it_changes(write, monkeypatch):
    """A change that keeps size and time of the contents, as a copy with its time, moves the other time."""
    path, reads = write(GOOD), []
    digest = hashing.hashlib.file_digest
    monkeypatch.setattr(hashing.hashlib, "file_digest", lambda *given: reads.append(given) or digest(*given))
    later = time.time_ns() + 2 * hashing.SETTLED
    monkeypatch.setattr(hashing.time, "time_ns", lambda: later)
    before = hashing.sha256(path)
    assert hashing.sha256(path) == before
    assert len(reads) == 1
    about = path.stat()
    path.write_text(path.read_text().replace("4", "5"))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size
    assert hashing.sha256(path) != before


def test_a_file_that_was_changed_just_now_is_read_again(write, monkeypatch):
    path, reads = write(GOOD), []
    digest = hashing.hashlib.file_digest
    monkeypatch.setattr(hashing.hashlib, "file_digest", lambda *given: reads.append(given) or digest(*given))
    assert hashing.sha256(path) == hashing.sha256(path)
    assert len(reads) == 2
