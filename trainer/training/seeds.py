"""Seeds: one for the process, and a random stream of its own for each use of randomness."""

from __future__ import annotations

import random

import numpy as np
import torch

from trainer.training.options import StageConfig


def seed_process(seed: int) -> None:
    """Seeds the generators that anybody may use without asking: Python's, numpy's and torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(cfg: StageConfig, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own, so that one use of randomness does not shift another."""
    return torch.Generator(device).manual_seed(cfg.seed * 1000 + stream)
