"""Which versions of somebody else's package will do."""

from __future__ import annotations

from importlib import metadata

import pytest

from rlhf_kernels.integrations.versions import require


@pytest.mark.parametrize(
    ("found", "will_do"),
    [("1.16.0", True), ("1.16.3", True), ("1.16rc1", True), ("1.15.9", False), ("1.17", False), ("1.17.0.dev0", False),
     ("2.0+cpu", False), ("1.16.0+cu130", True), ("unknown", False)],
)  # fmt: skip
def test_a_version_is_within_its_range_or_refused(monkeypatch: pytest.MonkeyPatch, found: str, will_do: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: found)
    if will_do:
        assert require("theirs", "1.16", "1.17") == found
    else:
        with pytest.raises(ImportError, match=r"theirs: got version .*, wants >=1\.16,<1\.17"):
            require("theirs", "1.16", "1.17")


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ImportError, match=r"no-such-package: got none installed, wants >=1,<2; pip install"):
        require("no-such-package", "1", "2")
