"""What options name as a reward, read without loading a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.rewards.names import aspects_of


def test_aspects_are_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "a,b@2").mkdir()
    assert aspects_of(str(tmp_path / "a,b@2"))[0].sources == (str(tmp_path / "a,b@2"),)
    assert [tuple(a) for a in aspects_of("runs/rm")] == [("reward", 1.0, ("runs/rm",))]
    assert [tuple(a) for a in aspects_of(("helpful=runs/a,runs/b", "https://x.org/f?n=1@-0.5", "brief=m:f@2e-1"))] == [
        ("helpful", 1.0, ("runs/a", "runs/b")),
        ("reward_2", -0.5, ("https://x.org/f?n=1",)),
        ("brief", 0.2, ("m:f",)),
    ]
    for bad, message in (
        ([], "want at least one"),
        ("a,", r"want \[NAME=\]SOURCE"),
        ("a@1.2.3", r"got the weight '1\.2\.3'"),
        (["x=a", "x=b"], "names x, x, want each once"),
    ):
        with pytest.raises(ValueError, match=message):
            aspects_of(bad)
