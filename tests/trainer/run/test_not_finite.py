"""Losses and gradients that stop being finite: the run stops, and leaves what went wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")

import torch
from safetensors.torch import load_file

import rlhf_kernels as rk
from tests.support.folders import put
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.runs import config, train
from tests.support.small import lines
from trainer.cli import program as cli
from trainer.run import folder as run_folder
from trainer.run.not_finite import NotFinite, save_batch
from trainer.stages import sft
from trainer.training.optimizer import Optimizer


def test_a_bad_batch_is_left_among_their_files(tmp_path: Path) -> None:
    put(tmp_path / "not_finite", {"notes.txt": "mine", "about.json": "old"})
    for step in (1, 2):
        save_batch(tmp_path / "not_finite", [], {"step": step})
        assert f'"step": {step}' in (tmp_path / "not_finite" / "about.json").read_text()
    assert (tmp_path / "not_finite" / "notes.txt").read_text() == "mine"


def test_a_bad_batch_has_the_names_that_are_looked_at(tmp_path: Path) -> None:
    save_batch(tmp_path, [], {"step": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(run_folder.BATCH)


@pytest.mark.parametrize("stage", ["policy", "value model"])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_pitfall_18_not_finite(
    stage: str, kind: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped without a trace in the weights, counted, forgiven after a good step; three in a row end the run."""
    cfg = config("ppo", path, tmp_path / "run", steps=4, max_tokens=1000, ptx_coef=0.0)
    step, bad, seen = Optimizer.step, {1, 2, 4, 5, 6}, []

    def poisoned(self: Optimizer, batches: Any, loss: Any, weights: Any) -> dict[str, float]:
        if self.name != stage:
            return step(self, batches, loss, weights)
        before = {n: p.detach().clone() for n, p in self.named.items()}
        seen.append(self)

        def worse(batch: Any) -> Any:
            out = loss(batch)
            if len(seen) not in bad:
                return out
            # A finite gradient under an infinite loss, or the root of zero: finite, with a slope of 0 / 0.
            odd = torch.tensor(math.inf) if kind == "loss" else (out.loss * 0).square().sqrt()
            return rk.LossOutput(out.loss + odd, out.metrics)

        try:
            return step(self, batches, worse, weights)
        finally:
            changed = any(not torch.equal(p, before[n]) for n, p in self.named.items())
            assert changed == (len(seen) not in bad)
            assert all(p.grad is None for p in self.parameters)

    monkeypatch.setattr(Optimizer, "step", poisoned)
    with pytest.raises(NotFinite, match=f"of the {stage} was not finite in 3 steps in a row"):
        train(cfg)
    assert seen[0].counters() == {"taken": 6, "skipped": 5, "skipped_in_a_row": 3}
    assert [row["skipped"] for row in lines(cfg.out / "metrics.jsonl")] == [3.0]
    about = json.loads((cfg.out / "not_finite" / "about.json").read_text())
    assert (about["model"], about["step"], about["micro_batches"]) == (stage, 6, 1)
    assert math.isfinite(float(about["losses"][0])) == (kind == "gradient")
    assert math.isfinite(float(about["grad_norm"])) == (kind == "loss")
    assert bool(about["parameters"]) == (kind == "gradient")
    batch = load_file(cfg.out / "not_finite" / "batch.safetensors")
    assert len(batch["0.packed.input_ids"]) == len(batch["0.old_logp"]) == sum(about["fields"]["0.packed.lengths"])


def test_pitfall_18_on_the_command_line(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(sft, "loss", lambda cfg, policy, batch, n: rk.LossOutput(policy.weight.sum() * math.nan, {}))
    data = ["--data", str(path / "sft.jsonl"), "--model", str(path / "base")]
    assert cli.main(["sft", *data, "--out", str(tmp_path / "run"), "--quiet"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("rlhf-train: the loss or the gradient of the policy was not finite in 3 steps in a row")
    assert said.count("\n") == 1
