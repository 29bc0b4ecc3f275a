"""The coefficient of the KL follows the published formula."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from tests.support.rollouts import world
from tests.support.small import lines
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.kl_controller import KLController


def test_pitfall_09_the_controller_follows_the_published_formula(tmp_path: Path) -> None:
    """Ziegler et al. 2019: e = clip(KL / target - 1, -0.2, 0.2), beta *= 1 + e * n / horizon; in the loop, too."""
    control, beta, source = KLController(0.15, 6.0, 10_000), 0.15, random.Random(0)
    for _ in range(50):
        kl = source.uniform(0, 15)
        control.update(kl, 512)
        beta *= 1 + max(-0.2, min(0.2, (kl - 6) / 6)) * 512 / 10_000
        assert control.coef == pytest.approx(beta, rel=1e-12)
    fixed = KLController(0.15)
    fixed.update(100.0, 512)
    assert fixed.coef == 0.15
    for odd in (math.nan, math.inf, -math.inf):
        control.update(odd, 512)
    assert control.coef == pytest.approx(beta, rel=1e-12), "what is not a number says nothing"

    options = world(tmp_path) | {"steps": 6, "kl_coef": 0.2, "kl_target_per_seq": 0.5, "kl_horizon": 100.0}
    rl_stage.ppo(ppo.PPOConfig(**options, lr=1e-2))
    beta = 0.2
    for step in lines(tmp_path / "out" / "metrics.jsonl"):
        assert step["objective/kl_coef"] == pytest.approx(beta, rel=1e-6)
        beta *= 1 + max(-0.2, min(0.2, step["objective/kl"] / 0.5 - 1)) * 10 / 100
    assert beta > 0.19
