"""Models on disk: no pickle, and never half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.small import ragged, small_policy, small_scalar
from trainer.data.packing import pack
from trainer.models.loading import load_policy, load_scalar


def test_saved_models_hold_no_pickle_and_speak_as_before(tmp_path: Path) -> None:
    policy, scalar, packed = small_policy(), small_scalar(), pack(ragged(6))
    scalar.set_statistics(torch.tensor([1.0, 3.0]))
    for name, model in {"policy": policy, "scalar": scalar}.items():
        model.save(tmp_path / name / "model")
        suffixes = {f.suffix for f in (tmp_path / name).rglob("*") if f.is_file()}
        assert ".safetensors" in suffixes
        assert suffixes <= {".safetensors", ".json"}
    with torch.no_grad():
        assert torch.equal(load_policy(str(tmp_path / "policy")).stats(packed).logp, policy.stats(packed).logp)
        again = load_scalar(str(tmp_path / "scalar"))
        assert torch.equal(again.scores(packed), scalar.scores(packed))
        torch.testing.assert_close(again.scores(packed), again.raw_scores(packed) - 2)
        # A new head on an old backbone: another number per token from the same hidden states.
        fresh = load_scalar(str(tmp_path / "policy"), torch.Generator().manual_seed(0))
        torch.testing.assert_close(fresh.values(packed), fresh.head(policy.hidden(packed)).squeeze(-1))


def test_an_interrupted_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, packed = small_policy(0), small_policy(1), pack(ragged(3))
    old.save(tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(new.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        new.save(tmp_path / "model")
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(load_policy(str(tmp_path)).stats(packed).logp, old.stats(packed).logp)
        new.save(tmp_path / "model")
        assert torch.equal(load_policy(str(tmp_path)).stats(packed).logp, new.stats(packed).logp)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
