"""In which precision matrix products are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.stages.sft import SFTConfig
from trainer.training.precision import autocast


@pytest.mark.parametrize(("precision", "made_in"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_are_made_in_the_precision_that_is_asked_for(precision: str, made_in: torch.dtype) -> None:
    cfg = SFTConfig(model="tiny", data=Path("data.jsonl"), out=Path("out"), precision=precision)
    a = torch.eye(4)
    with autocast(cfg, torch.device("cpu")):
        assert (a @ a).dtype == made_in
    assert (a @ a).dtype == torch.float32
