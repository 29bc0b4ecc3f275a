"""In which precision matrix products are made."""

from __future__ import annotations

import torch

from trainer.training.options import StageConfig


def autocast(cfg: StageConfig, device: torch.device) -> torch.autocast:
    """The precision of the configuration, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")
