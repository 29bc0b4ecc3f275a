"""`rlhf-train split` keeps all that belongs to a prompt together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")

from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.small import lines, write
from trainer.stages import split


def test_a_split_keeps_prompts_together(tmp_path: Path) -> None:
    records = [{"question": f"q{i % 40}", "answer": str(i)} for i in range(120)]
    more = [*records, {"question": "other", "answer": "x"}]

    def parts(records: list[dict[str, Any]], **options: Any) -> list[list[dict[str, Any]]]:
        cfg = split.SplitConfig(data=write(tmp_path / "d.jsonl", records), out=tmp_path, quiet=True, **options)
        counts = split.split(cfg)
        found = [lines(tmp_path / name) for name in (split.TRAIN, split.HELD_OUT)]
        assert [len(part) for part in found] == list(counts.values())
        return found

    train, held_out = parts(records, held_out=0.3)
    assert not {r["question"] for r in train} & {r["question"] for r in held_out}
    assert sorted([*train, *held_out], key=str) == sorted(records, key=str)
    assert [int(r["answer"]) for r in train] == sorted(int(r["answer"]) for r in train)
    assert 5 <= len({r["question"] for r in held_out}) <= 19  # 12 of 40 are meant
    again = parts(more, held_out=0.3)
    assert [[r for r in part if r["question"] != "other"] for part in again] == [train, held_out]
    assert parts(records, held_out=0.3, seed=1) != [train, held_out]
    with pytest.raises(ValueError, match=r"held_out: got 0.3 of .*, which gives .*, want rows in both"):
        parts(records[:1], held_out=0.3)
