"""Random streams: each use of randomness has its own, and a seed repeats them all."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.stages.sft import SFTConfig
from trainer.training.seeds import generator


def drawn(seed: int, stream: int) -> tuple[float, ...]:
    cfg = SFTConfig(model="tiny", data=Path("data.jsonl"), out=Path("out"), seed=seed)
    return tuple(torch.rand(8, generator=generator(cfg, stream)).tolist())


def test_streams_differ_and_repeat() -> None:
    every = [(seed, stream) for seed in range(4) for stream in range(8)]
    first = {which: drawn(*which) for which in every}
    assert len(set(first.values())) == len(every)
    torch.rand(3)  # Whoever else draws shifts none of them.
    assert all(drawn(*which) == numbers for which, numbers in first.items())
