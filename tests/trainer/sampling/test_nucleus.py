"""Sampling from the likeliest tokens only."""

from __future__ import annotations

import torch

from tests.support.small import small_policy
from trainer.data.packing import Sample, pack
from trainer.sampling.nucleus import nucleus
from trainer.sampling.rollout import sample


def test_the_nucleus_holds_the_likeliest_tokens_and_no_more() -> None:
    logp = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).log()
    torch.testing.assert_close(
        nucleus(logp, 0.7).exp(), torch.tensor([[0, 4 / 7, 3 / 7, 0], [1, 0, 0, 0]]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(nucleus(logp, 0.71).exp()[0], torch.tensor([0, 4 / 9, 3 / 9, 2 / 9]))
    policy, source = small_policy(), torch.Generator().manual_seed(0)
    rollout = sample(policy, [[2, 3]] * 500, max_new_tokens=1, generator=source, top_p=0.3)
    with torch.no_grad():
        p = torch.softmax(policy.logits(policy.hidden(pack([Sample([2, 3], 2)]))[-1:])[0], -1)
    least = min(float(p[rollout.response(i)[0]]) for i in range(500))
    assert float(p[p > least].sum()) < 0.3 < float(p[p >= least].sum()) + 1e-6
