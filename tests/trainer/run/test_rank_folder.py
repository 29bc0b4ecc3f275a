"""Folders of the other ranks: locked while they run, and cleared away after them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")

from tests.support.folders import put
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.runs import Stopper, config, stopped_at
from tests.support.small import small_policy
from trainer.base import ranks
from trainer.run import rank_folder
from trainer.run.checkpoint import Checkpoints
from trainer.training.session import Session


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.skipif(ranks.fcntl is None, reason="there are no locks")
def test_what_a_killed_rank_left_goes_with_the_next_start(temporary: Path, here: Path) -> None:
    names = {name: f"rlhf-train-rank-{name}" for name in ("deadbeef", "alive___", "young___", "mine", "linked__")}
    for name in (*names.values(), "rlhf-train-notes"):
        put(temporary / name, {"run/metrics.jsonl": "x"})
    shutil.rmtree(temporary / names["linked__"])
    (temporary / names["linked__"]).symlink_to(here)
    held, old = rank_folder._locked(temporary / names["alive___"]), time.time() - 3600
    for name in os.listdir(temporary):
        if name != names["young___"]:
            os.utime(temporary / name, (old, old))
    assert held is not None
    cfg = config("sft", here, temporary / "run")
    assert rank_folder.placed(cfg) is cfg
    assert sorted(os.listdir(temporary)) == sorted({*names.values(), "rlhf-train-notes"} - {names["deadbeef"]})
    os.close(held)
    rank_folder.placed(cfg)
    assert names["alive___"] not in os.listdir(temporary)
    assert (here / "sft.jsonl").exists()


def test_a_rank_locks_its_folder_and_copies_no_weights(
    temporary: Path, here: Path, tmp_path: Path, stopper: Stopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("sft", here, tmp_path / "run", save_every=1)
    stopped_at(cfg, stopper, 2)
    small_policy().save(cfg.out / "model")
    monkeypatch.setattr("atexit.register", lambda *_, **__: None)
    mine = rank_folder._own_folder()
    assert rank_folder._locked(mine.parent) is None, "it is held already"
    rank_folder._look_into(cfg.out, mine)
    assert sorted(p.name for p in mine.iterdir()) == ["checkpoints", "metrics.jsonl", "resolved.yaml"]
    assert Checkpoints(mine).latest(print) is not None
    monkeypatch.setattr(ranks, "mine", lambda: 1)
    with Session(dataclasses.replace(cfg, out=mine), None, "sft"):
        pass
    assert Checkpoints(cfg.out).names() == ["step-0000001", "step-0000002"], "they are the first rank's"
