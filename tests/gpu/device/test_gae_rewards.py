"""Shaped rewards on a GPU against the same in plain torch, which the CPU's tests hold to the oracle."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk

PACKINGS = {
    "ragged": [5, 0, 1, 30, 0, 700, 3333, 0, 1024, 1],
    "one long": [1_000_000],
    "many short": [1, 2, 3, 0] * 50_000,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_shaped_rewards(lengths: list[int], kl: str, dtype: torch.dtype):
    pytest.importorskip("rlhf_kernels.backends.triton_rewards")
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logp, ref_logp = (-torch.rand(2, n, generator=g, dtype=torch.float64) * 4).to(dtype)
    scores = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    mask, cu_seqlens = torch.rand(n, generator=g) >= 0.4, torch.tensor([0, *lengths]).cumsum(0)
    options = {"beta": 0.3, "kl": kl, "kl_clip": 1.0}
    want = rk.shaped_rewards(scores.double(), logp.double(), ref_logp.double(), cu_seqlens, mask=mask, **options)
    on = [x.cuda() for x in (scores, logp, ref_logp, cu_seqlens)]
    runs = [rk.shaped_rewards(*on, mask=mask.cuda(), **options) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    for x, exact in zip(runs[0], want, strict=True):
        ulps = 4 if dtype == torch.float32 else 256  # float64 sums err as their oracle's
        error = (x.cpu().double() - exact).abs().max().item()
        assert error <= ulps * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
