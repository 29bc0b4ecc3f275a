"""What the documents show and doctest cannot run, runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def test_a_pole_is_balanced_from_preferences(capsys):
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in re.findall(r"```python\n(.*?)```", (DOCS / "cartpole.md").read_text(), re.S):
            exec(block, names)
    assert names["agreement"] > 0.7
    assert sum(names["lengths"][-3:]) / 3 > 6 * names["lengths"][0]
    assert "steps before the pole falls, of 200" in capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.stem)
def test_a_block_is_run_by_somebody(page):
    """By doctest, where it has prompts; else by a test that reads the page."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    plain = [b for b in blocks if not b.lstrip().startswith(">>>")]
    readers = "".join(p.read_text() for p in Path(__file__).parent.rglob("*.py"))
    assert not plain or page.name in readers
