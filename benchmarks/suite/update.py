"""An update of the trainer at a size that takes a second."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.measure import place
from benchmarks.studies.update import parity
from benchmarks.work.update import LOSSES, SIZES, World, small_policy


@cache
def _world(device: str) -> tuple[World, dict[str, float]]:
    """And how far its losses are apart."""
    world = World(SIZES["small"], small_policy(SIZES["small"]).to(place.place(device)))
    return world, parity(world)


@pytest.mark.parametrize("loss", LOSSES)
def test_update(benchmark: Any, timed: Any, in_time: Any, device: str, loss: str) -> None:
    if not in_time():
        pytest.skip("time is over")
    benchmark.group = f"PPO update {SIZES['small']}"
    world, apart = _world(device)
    benchmark.extra_info |= apart
    timed(lambda: world.update(LOSSES[loss]), rounds=5, warmup_rounds=1)
