"""A file is written whole or stays as it was, and whoever cannot write it is told its name."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trainer.base.files import DRAFT, told, write_whole


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_whole(tmp_path / "a.json", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"a\.json could not be written: No space left on device") as caught:
        write_whole(file, b"new and longer")
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old"
    monkeypatch.undo()
    assert write_whole(file, b"new").read_bytes() == b"new"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_draft_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (other := tmp_path / "other").write_bytes(b"theirs")
    (tmp_path / f"a.json{DRAFT}").symlink_to(other)
    write_whole(tmp_path / "a.json", b"ours")
    assert other.read_bytes() == b"theirs"
    assert (tmp_path / "a.json").read_bytes() == b"ours"
    assert not (tmp_path / "a.json").is_symlink()


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), told(tmp_path / "a.json"):
        1 / 0  # noqa: B018
