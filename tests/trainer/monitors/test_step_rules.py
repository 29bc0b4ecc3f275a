"""An update that goes too far is told in the rollout in which it happens, with one optimizer step or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.small import LETTERS, lines, small_policy, write
from trainer.stages.rl import grpo
from trainer.stages.rl import stage as rl_stage


@pytest.mark.parametrize(("lr", "loud"), [(3.0, True), (1e-4, False)])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_too_far_is_told_at_once(tmp_path: Path, lr: float, loud: bool, passes: int) -> None:
    small_policy().save(tmp_path / "m")
    path = write(tmp_path / "d.jsonl", [{"prompt": f"{a} {b}"} for a in LETTERS[:4] for b in LETTERS[:4]])
    options: dict[str, Any] = {"epochs": passes, "minibatches": passes, "warmup_steps": 1, "lr": lr}
    cfg = grpo.GRPOConfig(
        model=str(tmp_path / "m"), data=path, out=tmp_path / "o", reward="tests.support.small:share_of_a", steps=1,
        batch_size=16, max_new_tokens=12, quiet=True, **options,
    )  # fmt: skip
    rl_stage.grpo(cfg)
    (row,) = lines(tmp_path / "o" / "metrics.jsonl")
    assert (row["policy/kl_after"] > 0.1) is loud
    assert row["policy/kl_after"] > 0
    alarms = lines(tmp_path / "o" / "alarms.jsonl") if (tmp_path / "o" / "alarms.jsonl").exists() else []
    told = [alarm for alarm in alarms if alarm["name"] == "update"]
    assert bool(told) is loud
    assert all("nats per token from the one that sampled" in alarm["message"] for alarm in told)


def test_a_rollout_without_news_breaks_no_rule_twice() -> None:
    from trainer.monitors.monitor import Monitor

    monitor = Monitor()
    assert not monitor.observe(1, {"kl": 0.0})
    assert not monitor.observe(2, {"kl": 60.0})
    assert not monitor.observe(3, {"no_difference": 1.0})
    assert [alarm.name for alarm in monitor.observe(4, {"kl": 60.0}) + monitor.observe(5, {"kl": 60.0})] == ["kl"]
