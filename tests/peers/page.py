"""What docs/integrations.md shows, for the tests that run it."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import torch

import rlhf_kernels as rk

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def shown(section: str) -> str:
    """The block of a section that is not a doctest."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if not block.startswith(">>>"))


def examples() -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(PAGE.read_text())


def defined() -> dict[str, Any]:
    """Names that the page imports and defines, the loop with accelerate among them."""
    names: dict[str, Any] = {"torch": torch, "rk": rk}
    for example in examples():
        if example.source.startswith(("from", "def")):
            exec(example.source, names)
    exec(shown("The same with accelerate"), names)
    return names
