"""What an alarm does to a run, and that watching does nothing to it."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.small import LETTERS, lines, small_policy, write
from trainer.monitors.history import Thresholds, thresholds_from
from trainer.report import page as report
from trainer.run.log import RunLog
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.stage import check_run
from trainer.training.defaults import decided


def rollouts(path: Path, **options: Any) -> ppo.PPOConfig:
    """A short run whose every response is cut off, which is an alarm at the first update."""
    small_policy(scale=1.0).save(path / "model")
    source = random.Random(0)
    data = write(path / "prompts.jsonl", ({"prompt": " ".join(source.sample(LETTERS, 2))} for _ in range(8)))
    return ppo.PPOConfig(
        model=str(path), data=data, out=path / "out", reward="tests.support.small:share_of_a", steps=3, batch_size=8,
        max_new_tokens=1, truncation_score=-2.0, quiet=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("act", "updates", "coefficient"), [("note", 3, 0.1), ("stop", 1, 0.1), ("raise_kl", 3, 0.2)])
def test_what_an_alarm_does_to_a_run(tmp_path: Path, act: str, updates: int, coefficient: float):
    cfg = rollouts(tmp_path, on_alarm=act, gold_reward="tests.support.small:share_of_a")
    rl_stage.ppo(cfg, RunLog(cfg.out, quiet=True))
    logged = lines(cfg.out / "metrics.jsonl")
    assert len(logged) == updates
    assert logged[-1]["objective/kl_coef"] == pytest.approx(coefficient)
    assert logged[0]["monitor/gold"] == pytest.approx(logged[0]["objective/scores"])
    (alarm,) = lines(cfg.out / "alarms.jsonl")
    assert (alarm["stage"], alarm["name"], alarm["step"], alarm["since"]) == ("ppo", "truncation", 1, 1)
    assert (cfg.out / "model" / "config.json").exists()
    page = report.write(cfg.out).read_text(encoding="utf-8")
    assert "Alarm in ppo, update 1: truncation" in page
    assert "the reward is being ignored: 100% of the responses were cut off by the limit" in page
    assert "so that nothing of the reward is left. Raise max_new_tokens (responses have 1 tokens" in page


def test_thresholds_can_be_named(tmp_path: Path) -> None:
    """As the command line and recipes give them. The entropy of this run stays as it is, which is now too little."""
    calm = rollouts(tmp_path, thresholds=("entropy=2", "patience=1"))
    rl_stage.ppo(calm, RunLog(calm.out, quiet=True))
    named = [alarm["name"] for alarm in lines(calm.out / "alarms.jsonl")]
    assert sorted(named) == ["collapse", "truncation"]
    assert thresholds_from(()) == Thresholds()
    for bad, message in (
        ("kl=3", "thresholds: unknown option 'kl'; "),
        ("kl_per_sec=3", "did you mean 'kl_per_seq'?"),
        ("window=2.5", "thresholds: got window=2.5, want NAME=NUMBER"),
        ("kl_growth", "thresholds: got kl_growth, want NAME=NUMBER"),
        ("kl_growth=-1", "kl_growth: got -1.0, want a positive number"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_run(decided(rollouts(tmp_path, thresholds=(bad,))))


def test_held_out_text_and_probes_are_watched(tmp_path: Path):
    texts = write(tmp_path / "texts.jsonl", ({"text": " ".join(LETTERS[i : i + 6])} for i in range(5)))
    asked = {"probe": "sycophancy", "prompt": "a b", "pressed": "a b c", "answer": "no such word"}
    probe = write(tmp_path / "probes.jsonl", [{"probe": "self_praise", "pattern": "a"}, asked])
    cfg = rollouts(tmp_path, tax_data=texts, probes=probe, eval_every=2, lr=0.05)
    rl_stage.ppo(cfg, RunLog(cfg.out, quiet=True))
    first, second, third = lines(cfg.out / "metrics.jsonl")
    assert first["eval/lm_loss"] > 0
    assert second["eval/lm_loss"] != first["eval/lm_loss"]
    assert second["eval/sycophancy_known"] == 0
    assert "eval/sycophancy" not in second
    assert 0 <= third["monitor/self_praise"] <= 1


def test_watching_changes_no_bit_of_the_policy(tmp_path: Path):
    """A gold reward, held-out text and probes are looked at in every update, and nothing learns from them."""
    texts = write(tmp_path / "texts.jsonl", ({"text": " ".join(LETTERS[i : i + 6])} for i in range(5)))
    asked = {"probe": "sycophancy", "prompt": "a b", "pressed": "a b c", "answer": "c"}
    probe = write(tmp_path / "probes.jsonl", [{"probe": "self_praise", "pattern": "a"}, asked])
    watched = {"gold_reward": "tests.support.small:share_of_a", "tax_data": texts, "probes": probe, "eval_every": 1}
    weights = []
    for name, options in {"alone": {}, "watched": watched}.items():
        cfg = replace(rollouts(tmp_path, lr=0.05, **options), out=tmp_path / name, max_new_tokens=6)
        rl_stage.ppo(cfg, RunLog(cfg.out, quiet=True))
        seen = lines(cfg.out / "metrics.jsonl")
        assert [{"monitor/gold", "eval/lm_loss", "eval/sycophancy_known"} <= row.keys() for row in seen] == (
            [name == "watched"] * 3
        )
        weights.append((cfg.out / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
