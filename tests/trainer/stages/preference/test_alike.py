"""Pairs that are alike once they are cut teach nothing: they are left out, and that is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.small import write
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.stages.preference import dpo, kto
from trainer.stages.preference import loop as preference


def alike(method: Any, rows: Sequence[dict[str, Any]], folder: Path, **options: Any) -> tuple[int, list[str]]:
    """Units that a preference stage trains on where its sequences have 32 tokens, and its notes."""
    tiny_policy(byte_tokenizer(["words"], 270), 0, hidden=32, layers=1).save(folder / "m")
    cfg = type(method.cfg)(**vars(method.cfg) | options) if hasattr(method, "cfg") else options.pop("cfg")
    told: list[str] = []
    loop = preference.PreferenceLoop(cfg, method, told.append)
    assert loop.train.reference is None or len(loop.train.reference.known) == len(loop.train.replies.samples)
    return len(loop.train.replies.units), told


LONG = "the same beginning, word for word, " * 3


CUT = [{"prompt": f"q{i}", "chosen": f"{LONG}good", "rejected": f"{LONG}bad"} for i in range(6)]


SHORT = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(6, 8)]


def test_pairs_that_are_alike_once_cut_are_left_out_and_told(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [*CUT, *SHORT])
    options: dict[str, Any] = {
        "model": str(tmp_path / "m"), "data": path, "out": tmp_path / "o", "steps": 1, "batch_size": 8,
        "max_length": 32, "quiet": True,
    }  # fmt: skip
    cfg = dpo.DPOConfig(**options)
    kept, told = alike(dpo.Pairs("dpo", 32, lambda *a: None), [], tmp_path, cfg=cfg)  # type: ignore[arg-type,return-value]
    assert kept == 2
    assert any("6 of 8 have replies of different rank that read alike, cut to 32 tokens" in x for x in told)
    method = kto.KTO(kto.KTOConfig(**options))
    kept, told = alike(method, [], tmp_path)
    assert kept == 4
    assert any("6 of 8 have replies" in x for x in told)


def test_nothing_but_such_pairs_is_refused(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", CUT)
    cfg = dpo.DPOConfig(
        model=str(tmp_path / "m"), data=path, out=tmp_path / "o", steps=1, batch_size=8, max_length=32, quiet=True
    )
    with pytest.raises(ValueError, match="data: the replies to each prompt are identical as the model reads them"):
        alike(dpo.Pairs("dpo", 32, lambda *a: None), [], tmp_path, cfg=cfg)  # type: ignore[arg-type,return-value]
