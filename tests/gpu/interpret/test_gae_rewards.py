"""Shaped rewards, interpreted, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from rlhf_kernels import reference
from rlhf_kernels.backends import triton_rewards

BLOCK = 32
PACKINGS = {
    "ragged": [5, 0, 1, 30, 0, 64, 33, 0],
    "one long": [300],
    "many short": [1, 2, 3, 0] * 20,
    "boundaries on blocks": [32, 64, 0, 0, 32, 31, 1],
}


def batch(lengths, dtype=torch.float32, masked=0.4):
    """Masked rows hold NaN, the last rows of some sequences among them."""
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logp, ref_logp = (-torch.rand(2, n, generator=g, dtype=torch.float64) * 4).to(dtype)
    mask = torch.rand(n, generator=g) >= masked
    scores = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    return (
        scores,
        logp.where(mask, torch.nan),
        ref_logp.where(mask, torch.nan),
        torch.tensor([0, *lengths]).cumsum(0),
        mask,
    )


def assert_true(given, kl="k1", kl_clip=None, beta=0.3, **shape):
    scores, logp, ref_logp, cu_seqlens, mask = given
    got = triton_rewards.shaped_rewards(*given, beta, kl, kl_clip, block=BLOCK, **shape)
    exact = reference.shaped_rewards(
        scores, logp, ref_logp, cu_seqlens, beta=float(beta), mask=mask, kl=kl, kl_clip=kl_clip
    )
    for x, want in zip(got, exact, strict=True):
        assert x.dtype == logp.dtype
        error = (x.double() - want).abs().max().item()
        assert error <= 2 * torch.finfo(x.dtype).eps * max(1.0, want.abs().max().item())
    assert mask is None or not got[0][~mask].any()


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_any_packing(lengths):
    assert_true(batch(lengths), programs=32)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_clip", [None, 0.5])
def test_any_estimator(kl, kl_clip):
    assert_true(batch([60, 5]), kl, kl_clip, programs=32)


def test_beta_as_a_tensor_and_no_mask():
    scores, logp, ref_logp, cu_seqlens, _ = batch([40, 0, 9], masked=0.0)
    assert_true((scores, logp, ref_logp, cu_seqlens.int(), None), beta=torch.tensor(0.25), programs=32)


def test_float64():
    assert_true(batch([70, 3], torch.float64), "k3", programs=32)


def test_programs_of_several_tiles():
    assert_true(batch([100, 0, 150, 7, 43]), programs=4)


def test_a_sequence_without_mask_has_nowhere_to_put_its_score():
    assert_true(batch([40, 3, 40], masked=1.1), programs=32)


def test_an_enormous_ratio_is_held_below_overflow():
    logp = torch.tensor([-500.0, -1.0])
    rewards, kl = triton_rewards.shaped_rewards(
        torch.zeros(1), logp, torch.tensor([0.0, -1.0]), torch.tensor([0, 2]), None, 1.0, "k3", None, block=BLOCK
    )
    assert rewards.isfinite().all()
    assert kl.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_stays_in_its_sequence(bad):
    given = batch([40, 40, 40], masked=0.0)
    run = lambda: triton_rewards.shaped_rewards(*given, 0.1, "k1", None, block=BLOCK, programs=32)  # noqa: E731
    clean = run()
    given[1][60] = bad
    got = run()
    assert torch.equal(got[1].isfinite(), torch.tensor([True, False, True]))
    assert torch.equal(got[0].isfinite().nonzero().flatten(), torch.tensor([i for i in range(120) if i != 60]))
    assert torch.equal(got[1][::2], clean[1][::2])
