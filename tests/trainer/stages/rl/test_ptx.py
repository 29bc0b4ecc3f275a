"""Text that the policy should not forget: the loss is added with its coefficient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import gradient, world
from tests.support.small import lines, small_policy, write
from trainer.data.encoding import encode_pairs
from trainer.data.packing import pack
from trainer.models.policy import Policy
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.stage import begin


@pytest.mark.parametrize("train", ["ppo", "grpo"])
def test_pitfall_23_ptx_with_coefficient_zero_is_bitwise_without(train: str, tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path)
    rows = [{"prompt": "b", "response": "c d e"}, {"prompt": "f g", "response": "h"}, {"prompt": "e", "response": "a"}]
    texts = write(tmp_path / "texts.jsonl", rows)
    models, logs = [], []
    for name, ptx in {
        "without": {}, "zero": {"ptx_coef": 0.0, "ptx_data": texts}, "one": {"ptx_coef": 1.0, "ptx_data": texts},
    }.items():  # fmt: skip
        options["out"] = tmp_path / name
        if train == "ppo":
            rl_stage.ppo(ppo.PPOConfig(**options, **ptx, ptx_batch_size=2))
        else:
            rl_stage.grpo(grpo.GRPOConfig(**options, **ptx, ptx_batch_size=2, num_generations=2))
        models.append((options["out"] / "model" / "model.safetensors").read_bytes())
        logs.append(lines(options["out"] / "metrics.jsonl"))
    assert models[0] == models[1] != models[2]
    assert "loss/ptx_avg" not in logs[1][0]
    assert 2 < logs[2][0]["loss/ptx_avg"] < 4  # a random model over 22 tokens: 3.1
    # The policy's own loss is logged without it; the first update had yet to move anything.
    assert logs[2][0]["objective/scores"] == logs[0][0]["objective/scores"]


def test_ptx_adds_its_coefficient_times_the_language_model_loss(tmp_path: Path) -> None:
    """Ouyang et al., equation 2, in the gradient of one optimizer step, over several micro-batches of either kind."""
    options: dict[str, Any] = world(tmp_path) | {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}
    rows = [{"prompt": "b", "response": "c d e"}, {"prompt": "f g", "response": " ".join("hij" * 10)}] * 3
    options |= {"ptx_data": write(tmp_path / "texts.jsonl", rows), "ptx_batch_size": 6, "max_tokens": 40}
    found: list[torch.Tensor] = []
    for coef in (0.0, 0.25):
        cfg = ppo.PPOConfig(**options, ptx_coef=coef)
        loop = begin(cfg, ppo.PPO(cfg), print).loop
        policy = loop.state.policy

        def taken(policy: Policy = policy) -> None:
            found.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None]))

        loop.state.optimizers["policy"].adam.step = taken  # type: ignore[method-assign, assignment]
        loop.rollout()
        assert loop.minibatch()
    policy = small_policy(scale=1.0)
    demonstrations = encode_pairs(policy.tokenizer, [r["prompt"] for r in rows], [r["response"] for r in rows], 1024)
    packed = pack(demonstrations)
    (-0.25 * policy.stats(packed).logp.sum() / packed.mask.sum()).backward()
    wanted = gradient(policy)
    assert wanted.norm() > 1e-2
    assert (found[1] - found[0] - wanted).norm() <= 1e-5 * wanted.norm()
