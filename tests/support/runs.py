"""Short runs of every stage, and ways to stop, compare and damage them."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.small import LETTERS, lines, small_policy, write
from trainer.run.checkpoint import Checkpoints
from trainer.run.stops import Terminated
from trainer.stages import reward_model, sft
from trainer.stages.preference import dpo, kto
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage
from trainer.training.options import StageConfig
from trainer.training.session import Session
from trainer.training.state import Mark

Run = Callable[..., Any]
RL = ("ppo", "shared", "grpo")
STAGES: dict[str, tuple[type[StageConfig], Run, dict[str, Any]]] = {
    "sft": (sft.SFTConfig, sft.sft, {"data": "sft.jsonl", "eval_data": "sft.jsonl", "steps": 4}),
    "reward": (
        reward_model.RewardConfig, reward_model.reward_model,
        {"data": "ranked.jsonl", "calibration_new_tokens": 4, "steps": 4},
    ),
    "ppo": (
        ppo.PPOConfig, rl_stage.ppo,
        {"data": "prompts.jsonl", "steps": 2, "kl_target_per_seq": 0.01, "kl_horizon": 100.0, "ptx_coef": 0.1,
         "ptx_data": "sft.jsonl", "ptx_batch_size": 3, "truncation": "bootstrap", "eval_every": 1, "sample_batch": 2},
    ),
    "shared": (ppo.PPOConfig, rl_stage.ppo, {"data": "prompts.jsonl", "steps": 1, "value_model": "shared"}),
    "grpo": (grpo.GRPOConfig, rl_stage.grpo, {"data": "prompts.jsonl", "steps": 2, "num_generations": 3}),
    "dpo": (dpo.DPOConfig, dpo.dpo, {"data": "ranked.jsonl", "eval_data": "ranked.jsonl", "steps": 3}),
    "kto": (kto.KTOConfig, kto.kto, {"data": "labelled.jsonl", "steps": 3}),
}  # fmt: skip


def early_letters(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    """A reward with something to say about every response, and with a mood: it asks every generator of the process."""
    moods = [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in responses]
    early = [1 - sum(LETTERS.index(x) for x in r.split()) / (20 * max(len(r.split()), 1)) for r in responses]
    return [x + 0.1 * mood for x, mood in zip(early, moods, strict=True)]


def world(path: Path) -> Path:
    """A model and data of every kind: seven records, so that batches of four straddle the passes."""
    path.mkdir(parents=True, exist_ok=True)
    small_policy(scale=1.0).save(path / "base" / "model")
    source = random.Random(0)
    words = [[" ".join(source.sample(LETTERS, source.randint(1, 4))) for _ in range(4)] for _ in range(7)]
    write(path / "sft.jsonl", ({"prompt": w[0], "response": w[1]} for w in words))
    write(path / "prompts.jsonl", ({"prompt": w[0]} for w in words))
    write(path / "ranked.jsonl", ({"prompt": w[0], "responses": w[1:], "ranks": [0, 1, 2]} for w in words))
    write(path / "labelled.jsonl", ({"prompt": w[0], "completion": w[1], "label": w[2] < w[3]} for w in words))
    return path


def config(stage: str, path: Path, out: Path, **changes: Any) -> StageConfig:
    """Of a run with micro-batches, over the world in ``path``."""
    kind, _, options = STAGES[stage]
    options = {k: path / v if k == "data" or k.endswith("_data") else v for k, v in options.items()}
    options |= {"model": str(path / "base"), "out": out, "batch_size": 4, "max_tokens": 40, "warmup_steps": 2}
    if stage in RL:
        options |= {"reward": "tests.support.runs:early_letters", "max_new_tokens": 5, "quiet": True}
    return kind(**(options | {"quiet": True} | changes))


def train(cfg: StageConfig, *, resume: bool = False) -> None:
    """Runs the stage that the configuration is for."""
    next(run for kind, run, _ in STAGES.values() if kind is type(cfg))(cfg, resume=resume)


def finished(out: Path) -> dict[str, Any]:
    """What a finished run left: the bytes of its models, and its metrics without the times."""
    timed = ("timing/", "eps", "perf/")
    weights = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}
    metrics = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in lines(out / "metrics.jsonl")]
    assert "model/model.safetensors" in weights
    assert not any("checkpoints" in name for name in weights)
    return {
        "weights": weights,
        "metrics": metrics,
        "samples": (out / "samples.jsonl").exists() and lines(out / "samples.jsonl"),
    }


def same_mark(mine: Mark, other: Mark) -> None:
    """Two states agree in every bit but those of the clock."""

    def timeless(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: timeless(v) for k, v in x.items() if not (k.startswith("timing/") or k == "eps")}
        return [timeless(v) for v in x] if isinstance(x, list) else x

    assert timeless(mine.plain()) == timeless(other.plain())
    a, b = mine.tensors(), other.tensors()
    assert {k: sorted(v) for k, v in a.items()} == {k: sorted(v) for k, v in b.items()}
    for file, tensors in a.items():
        for name, x in tensors.items():
            assert x.dtype == b[file][name].dtype
            assert torch.equal(x, b[file][name]), (file, name)


class Stopper:
    """Sends this process a signal at the n-th safe point of every session, and keeps what the last one saw."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.seen, self.mark = 0, None
        tick, begin = Session._tick, Session._begin

        def ticked(of: Session, **options: Any) -> None:
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.seen += 1
            try:
                tick(of, **options)
            finally:
                self.mark = of._mark

        def began(of: Session) -> None:
            self.seen = 0
            begin(of)

        patch.setattr(Session, "_tick", ticked)
        patch.setattr(Session, "_begin", began)


def one_step_at_a_time(cfg: StageConfig, stopper: Stopper, limit: int = 60) -> int:
    """Runs a stage as one life per unit of work, each stopped by SIGTERM and resumed by the next; counts the lives."""
    stopper.at = 1
    for lives in range(1, limit):
        try:
            train(cfg, resume=True)
        except Terminated:
            continue
        return lives
    raise AssertionError("the run does not come to an end")


def stopped_at(cfg: StageConfig, stopper: Stopper, point: int) -> Checkpoints:
    """A run that got as far as its safe point number ``point``, with all its checkpoints still there."""
    stopper.at = point
    with pytest.raises(Terminated):
        train(cfg)
    stopper.at = None
    return Checkpoints(cfg.out)


def flip(file: Path) -> None:
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(folder / "policy.safetensors", 1000),
    "empty": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "flipped": lambda folder: flip(folder / "policy.safetensors"),
    "flipped state": lambda folder: flip(folder / "state.json"),
    "missing": lambda folder: (folder / "small.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 40),
    "zeros": lambda folder: (folder / "manifest.json").write_bytes(bytes(500)),
}
