"""Supervised fine-tuning: what it leaves out, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.small import LETTERS, lines, small_policy, write
from tests.trainer.stages.test_stages import demonstrations
from trainer.data import reading as data
from trainer.models.loading import load_policy
from trainer.run.log import RunLog
from trainer.stages import sft


def test_pitfall_20_everything_left_out_is_counted_and_explained(tmp_path: Path) -> None:
    shown = [{"prompt": f"{a} {b}", "response": f"{b} {a}"} for a in LETTERS for b in LETTERS]
    shown[7] = {"prompt": "a", "response": " "}
    shown[8] = {"prompt": " ".join(LETTERS), "response": "a"}
    shown[9] = {"prompt": "a a a", "response": " ".join(LETTERS)}
    text = "\r\n".join([*map(json.dumps, shown[:300]), "{broken", *map(json.dumps, shown[300:])])
    (path := tmp_path / "shown.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    small_policy().save(tmp_path / "model")
    told: list[str] = []
    log = RunLog(tmp_path / "out", quiet=True)
    log.note = told.append  # type: ignore[method-assign]
    cfg = sft.SFTConfig(
        model=str(tmp_path), data=path, out=tmp_path / "out", steps=1, batch_size=4, max_length=16, quiet=True
    )
    sft.sft(cfg, log)
    all_of_it = "\n".join(told)
    assert "1 of 401 lines is bad (0.25%)" in all_of_it
    assert "line 301: invalid JSON" in all_of_it
    assert "1 with an empty reply" in all_of_it
    assert "line 8" in all_of_it
    assert "1 of 399 prompts have more than the 14 tokens" in all_of_it
    assert "(the longest has 20)" in all_of_it
    assert "1 of 399 responses do not fit into 16 tokens" in all_of_it

    pair = {"prompt": "p", "chosen": "same", "rejected": "same"}
    ranked = write(tmp_path / "ranked.jsonl", [pair, pair | {"rejected": "other"}])
    assert len(data.read(ranked, "ranked", note=told.append)) == 1
    assert "1 with identical replies" in told[-1]
    (pointer := tmp_path / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        data.read(pointer, "ranked")


def test_sft_learns_ten_examples_by_heart(base: str, tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "d.jsonl")
    cfg = sft.SFTConfig(
        model=base, data=data, out=tmp_path / "out", steps=120, batch_size=10, lr=1e-2, eval_data=data, quiet=True
    )
    policy = sft.sft(cfg)
    assert sft.held_out_loss(policy, sft.samples_of(cfg, policy, lines(data)), 1000) < 0.05
    again = load_policy(str(tmp_path / "out"))
    packed = sft.micro_batches(sft.samples_of(cfg, policy, lines(data)), 1000, "cpu")[0]
    with torch.no_grad():
        assert torch.equal(again.stats(packed).logp, policy.stats(packed).logp)
