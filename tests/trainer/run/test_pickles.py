"""No file of a run is a pickle, and none is read."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import Stopper, config, stopped_at, train
from trainer.models.loading import load_policy
from trainer.run.checkpoint import Checkpoint, Damaged


@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_pitfall_19_no_pickles(
    stage: str, path: Path, tmp_path: Path, stopper: Stopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for owner, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads"))):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    cfg = config(stage, path, tmp_path / "run")
    stopped_at(cfg, stopper, 2)
    assert (cfg.out / "checkpoints").exists()
    written = [p for p in cfg.out.rglob("*") if p.is_file()]
    train(cfg, resume=True)
    written += [p for p in cfg.out.rglob("*") if p.is_file()]
    assert {p.suffix for p in written} == {".safetensors", ".json", ".jsonl", ".yaml"}


def test_pitfall_19_pickles_are_refused(path: Path, tmp_path: Path, stopper: Stopper) -> None:
    cfg = config("sft", path, tmp_path / "run")
    folder = stopped_at(cfg, stopper, 2).folder / "step-0000002"
    (folder / "policy.pt").write_bytes(pickle.dumps({}))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(pickle.dumps({})).hexdigest()
    manifest["files"]["policy.pt"] = {"bytes": len(pickle.dumps({})), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"policy.pt is neither safetensors nor JSON"):
        Checkpoint(folder)

    model = tmp_path / "model"
    shutil.copytree(path / "base" / "model", model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_policy(str(model))
