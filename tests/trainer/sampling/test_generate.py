"""The sampler of transformers and our own agree with the training forward and with each other."""

from __future__ import annotations

import pytest
import torch

from tests.support.small import small_policy
from trainer.sampling.rollout import sample


def test_both_samplers_agree_with_the_training_forward_and_with_each_other() -> None:
    """Prompts of several lengths, responses that end and responses that are cut."""
    policy, prompts = small_policy(), [[2, 3, 4, 5, 6], [7], [8, 9, 10]] * 3
    policy.model.generation_config.repetition_penalty = 5.0  # what a model suggests for chats is not the policy
    before = torch.random.get_rng_state()
    seen = []
    for sampler in ("cached", "generate"):
        source = torch.Generator().manual_seed(3)
        for temperature, top_p in ((1.3, 1.0), (1.0, 0.8)):
            rollout = sample(
                policy, prompts, max_new_tokens=12, generator=source, temperature=temperature, top_p=top_p,
                sampler=sampler,  # type: ignore[arg-type]
            )  # fmt: skip
            assert any(rollout.truncated)
            assert not all(rollout.truncated)
            packed = rollout.pack("cpu")
            with torch.no_grad():
                logp = policy.stats(packed, temperature).logp
            if top_p == 1:
                assert rollout.sampler_delta(packed, logp) < 1e-4
            else:
                assert bool((rollout.logp_of(packed) >= logp - 1e-4)[packed.mask].all())
        greedy = sample(policy, prompts, max_new_tokens=9, generator=source, temperature=0, sampler=sampler)  # type: ignore[arg-type]
        seen.append(greedy)
    assert seen[0].samples == seen[1].samples
    for mine, theirs in zip(seen[0].sampler_logp, seen[1].sampler_logp, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = [
        sample(
            policy, prompts, max_new_tokens=5, generator=torch.Generator().manual_seed(s), sampler="generate"
        ).samples
        for s in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]
