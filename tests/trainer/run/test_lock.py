"""Two runs do not share a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import config, train
from trainer.run import folder as run_folder
from trainer.stages import sft


def test_pitfall_16_two_runs_do_not_share_a_folder(path: Path, tmp_path: Path) -> None:
    cfg, refused = config("sft", path, tmp_path / "run"), []

    def again(*args: Any) -> Any:
        for attempt in (lambda: train(cfg), lambda: train(cfg, resume=True), lambda: run_folder.claim(cfg.out)):
            with pytest.raises(ValueError, match="out: another process is training in"):
                attempt()
            refused.append(attempt)
        return loss(*args)

    loss = sft.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "loss", again)
        train(cfg)
    assert len(refused) >= 3
    train(cfg)
