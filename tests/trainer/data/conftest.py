"""What the tests of this room share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.models.tiny import byte_tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes records (or raw lines) to a jsonl file."""

    def writer(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return writer


@pytest.fixture
def plain() -> Any:
    return byte_tokenizer(["What is 2 + 2? It is 4."], 280)
