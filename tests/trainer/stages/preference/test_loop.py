"""What goes wrong in trainers that learn from preferences, each named after its number in the design."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.small import LETTERS, lines, small_policy, write
from trainer.cli import program as cli
from trainer.models.loading import load_policy
from trainer.models.policy import Policy
from trainer.stages.preference import dpo, kto
from trainer.stages.preference import loop as preference
from trainer.stages.preference.loop import PreferenceConfig, PreferenceLoop

STAGES: dict[str, tuple[type[PreferenceConfig], Callable[..., Policy], dict[str, Any]]] = {
    "dpo": (dpo.DPOConfig, dpo.dpo, {}),
    "hinge": (
        dpo.DPOConfig, dpo.dpo,
        {"loss": "hinge", "margin": 0.5, "sft_coef": 0.3, "length_normalize": True, "label_smoothing": 0.1},
    ),
    "ipo": (dpo.IPOConfig, dpo.ipo, {}),
    "orpo": (dpo.ORPOConfig, dpo.orpo, {}),
    "simpo": (dpo.SimPOConfig, dpo.simpo, {"sft_coef": 0.3}),
    "kto": (kto.KTOConfig, kto.kto, {"desirable_weight": 1.3}),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_pitfall_03_the_first_step_stands_at_the_reference(stage: str, world: dict[str, Any]) -> None:
    """Implicit rewards are zero before the first update, with dropout in the configuration as well."""
    policy = small_policy(scale=1.0)
    policy.model.config.attention_dropout = 0.1
    policy.save(Path(world["model"]) / "model")
    config, train, options = STAGES[stage]
    train(config(**world, **options, steps=1))
    (first,) = lines(world["out"] / "metrics.jsonl")
    if stage in ("orpo", "simpo"):
        assert first["rewards/chosen"] < 0
        return
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-6)
    if stage != "hinge":
        wanted = {"dpo": math.log(2), "ipo": 1 / 0.2**2, "kto": 0.5 * (1.3 + 1) / 2}[stage]
        share = first["loss"] if stage != "kto" else None
        assert share is None or share == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_pitfall_05_micro_batches_change_nothing(stage: str, world: dict[str, Any]) -> None:
    """Loss, every metric and the gradient of a step, away from the reference, for any budget."""
    config, train, options = STAGES[stage]
    found = []
    for budget in (10_000, 30, 1):
        loops: list[PreferenceLoop] = []

        def kept(
            cfg: PreferenceConfig,
            method: preference.PreferenceMethod,
            log: Any,
            resume: bool,
            into: list[PreferenceLoop] = loops,
        ) -> None:
            into.append(PreferenceLoop(cfg, method, print))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preference, "train_preference", kept)
            train(config(**world, **options, max_tokens=budget, lr=1e-2))
        (loop,) = loops
        metrics = [loop.step() for _ in range(2)][1]
        units = loop.train.replies.units[:7]
        parts, totals = loop.ready(loop.train, units)
        for part in parts:
            loop.loss(part, totals).loss.backward()
        flat = torch.cat([p.grad.flatten() for p in loop.state.policy.parameters() if p.grad is not None])
        found.append((len(parts), metrics, flat))
    assert [n for n, _, _ in found] == [1, found[1][0], 7]
    assert 1 < found[1][0] < 7
    for _, metrics, flat in found[1:]:
        # The weights themselves differ in their last bits after an optimizer step.
        assert (flat - found[0][2]).norm() <= 2e-4 * flat.norm()
        for name, x in metrics.items():
            assert x == pytest.approx(found[0][1][name], rel=2e-3, abs=2e-5), name


def labelled(path: Path, count: int) -> Path:
    source, rows = random.Random(2), []
    for i in range(count):
        words = source.sample(LETTERS[1:], source.randint(1, 6)) + ["a"] * (3 * (i % 3 == 0))
        rows.append({"prompt": " ".join(source.sample(LETTERS, 2)), "completion": " ".join(words), "label": i % 3 == 0})
    return write(path, rows)


@pytest.mark.parametrize("stage", STAGES)
def test_margins_rise(stage: str, world: dict[str, Any], tmp_path: Path) -> None:
    """On held-out replies, too, by the name that logs have had."""
    config, train, options = STAGES[stage]
    if stage == "kto":
        world["data"] = labelled(tmp_path / "l.jsonl", 60)
    train(config(**world | {"lr": 3e-3, "steps": 30, "eval_data": world["data"]}, **options))
    steps = lines(world["out"] / "metrics.jsonl")
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.05
    assert steps[-1]["loss"] < steps[0]["loss"]
    if stage == "kto":
        assert steps[-1]["rewards/chosen"] > 0 > steps[-1]["rewards/rejected"] - 0.05
    else:
        assert steps[-1]["rewards/accuracies"] >= 0.9
        assert steps[-1]["logps/chosen"] < 0
    assert '"held_out_' in (world["out"] / "summary.json").read_text()
    assert load_policy(str(world["out"])).weight.isfinite().all()


@pytest.mark.parametrize("stage", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_method_runs_from_the_command_line(
    stage: str, world: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):  # written by the command; the test's own come back
        monkeypatch.setenv(name, "1")
    flags = ["--model", world["model"], "--data", world["data"], "--out", world["out"], "--eval-data", world["data"]]
    assert cli.main([stage, *map(str, flags), "--steps", "2", "--batch-size", "5", "--quiet"]) == 0
    assert len(lines(world["out"] / "metrics.jsonl")) == 2
    assert (world["out"] / "report.html").exists()
    capsys.readouterr()
    assert cli.main([stage, *map(str, flags), "--beta", "0", "--overwrite"]) == 2
    assert "beta: got 0" in capsys.readouterr().err
