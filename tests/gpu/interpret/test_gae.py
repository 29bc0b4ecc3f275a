"""Packed advantages, interpreted, against the float64 oracle: whatever the packing, whichever program holds a row."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_kernels import reference
from rlhf_kernels.backends import gae as torch_gae
from rlhf_kernels.backends import triton_gae

BLOCK = 32
EPS = 1e-8


class Batch(NamedTuple):
    rewards: Tensor
    values: Tensor
    cu_seqlens: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None


def batch(lengths: list[int], dtype: torch.dtype = torch.float32, masked: float | None = 0.3, seed: int = 0) -> Batch:
    """Values are not small, as critics' are not; masked rows hold NaN, which must not matter."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    rewards, values = (torch.randn(2, n, generator=g, dtype=torch.float64) + torch.tensor([[0.0], [3.0]])).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    if masked is None:
        return Batch(rewards, values, cu_seqlens, None, None)
    mask = torch.rand(n, generator=g) >= masked
    bootstrap = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    return Batch(rewards.where(mask, torch.nan), values.where(mask, torch.nan), cu_seqlens, mask, bootstrap)


def launched(b: Batch, gamma: float, lam: float, eps: float | None = None, programs: int = 32) -> tuple[Tensor, Tensor]:
    return triton_gae._launch(*b, gamma, lam, eps, BLOCK, programs)


def assert_as_good_as_torch(got: tuple[Tensor, Tensor], b: Batch, gamma: float, lam: float, whiten: bool = False):
    """At most twice the error of the torch expression in the same dtype, and a few ulps."""
    exact = reference.gae(
        b.rewards, b.values, b.cu_seqlens, gamma=gamma, lam=lam, mask=b.mask, bootstrap=b.bootstrap, whiten=whiten
    )
    plain = torch_gae.gae(*b, gamma, lam)
    for x, want, yardstick, may_err in zip(got, exact, plain, (not whiten, True), strict=True):
        assert x.dtype == b.values.dtype
        error = (x.double() - want).abs().max().item()
        budget = 8 * torch.finfo(x.dtype).eps * max(want.abs().max().item(), 1.0)
        assert error <= budget + 2 * may_err * (yardstick.double() - want).abs().max().item()
        assert b.mask is None or not x[~b.mask].any()


PACKINGS = {
    "ragged": [5, 0, 1, 30, 0, 64, 33, 0],
    "one long": [500],
    "many short": [1, 2, 3, 0] * 30,
    "boundaries on blocks": [32, 64, 0, 0, 32, 31, 1],
    "long between short": [1, 0, 2, 300, 0, 3],
    "one row": [1],
}


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_any_packing(lengths: list[int], whiten: bool):
    b = batch(lengths)
    got = launched(b, 0.97, 0.9, EPS if whiten else None)
    assert_as_good_as_torch(got, b, 0.97, 0.9, whiten)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_any_discount(gamma: float, lam: float, dtype: torch.dtype):
    b = batch([70, 9, 0, 41], dtype)
    assert_as_good_as_torch(launched(b, gamma, lam, EPS), b, gamma, lam, whiten=True)


def test_neither_mask_nor_bootstrap():
    b = batch([40, 3, 60], masked=None)
    assert_as_good_as_torch(launched(b, 1.0, 0.95), b, 1.0, 0.95)
    b = b._replace(cu_seqlens=b.cu_seqlens.int())
    assert_as_good_as_torch(launched(b, 1.0, 0.95, EPS), b, 1.0, 0.95, whiten=True)


def test_nothing_kept():
    b = batch([50, 0, 20], masked=1.1)
    for x in (*launched(b, 1.0, 0.95), *launched(b, 1.0, 0.95, EPS)):
        assert not x.any()


def test_empty():
    for lengths in ([], [0, 0]):
        assert [x.shape for x in launched(batch(lengths), 1.0, 0.95, EPS)] == [(0,), (0,)]


@pytest.mark.parametrize("lengths", [[500], [100, 0, 150, 7, 243]], ids=str)
def test_programs_of_several_tiles(lengths: list[int]):
    """Beyond PROGRAMS blocks a program walks several, from the right."""
    b = batch(lengths)
    got = launched(b, 1.0, 1.0, EPS, programs=4)
    assert_as_good_as_torch(got, b, 1.0, 1.0, whiten=True)


def test_the_search_for_a_sequence_takes_several_rounds():
    """More sequences than one round of the search looks at: it divides by BLOCK twice."""
    lengths = [0, 1, 0] * 400 + [20]
    b = batch(lengths)
    assert len(lengths) > BLOCK**2
    assert_as_good_as_torch(launched(b, 0.9, 0.9), b, 0.9, 0.9)


def test_the_sum_of_rewards_over_many_programs():
    """Undiscounted, an advantage is what is still to come less the value, to the last bit of its float32."""
    n = 400
    rewards, values = torch.ones(n), torch.full((n,), 7.0)
    got, returns = triton_gae._launch(rewards, values, torch.tensor([0, n]), None, None, 1.0, 1.0, None, BLOCK, 32)
    assert torch.equal(returns, torch.arange(n, 0, -1.0))
    assert torch.equal(got, returns - 7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_reward_stays_in_its_sequence(bad: float):
    b = batch([40, 40, 40], masked=None)
    clean = launched(b, 1.0, 0.95)
    b.rewards[60] = bad
    for x, y in zip(launched(b, 1.0, 0.95), clean, strict=True):
        assert torch.equal(x[:40], y[:40])
        assert torch.equal(x[61:], y[61:])
        assert not x[40:61].isfinite().any()


def test_what_reaches_no_row_may_be_infinite():
    """The value after a sequence without mask, which lies across programs, does not enter mean and variance."""
    b = batch([10, 100, 30])
    assert b.mask is not None
    assert b.bootstrap is not None
    b.mask[10:110] = False
    want = launched(b, 1.0, 0.95, EPS)
    b.bootstrap[1] = torch.inf
    assert all(torch.equal(x, y) for x, y in zip(launched(b, 1.0, 0.95, EPS), want, strict=True))


def test_equal_advantages_whiten_to_zero():
    """The noise of the variance must not be divided by itself."""
    got, _ = triton_gae._launch(
        torch.full((90,), 1e4), torch.full((90,), 0.7), torch.arange(91), None, None, 1.0, 0.95, EPS, BLOCK, 32
    )
    assert got.abs().max() < 1e-6


def test_two_runs_are_bitwise_equal():
    b = batch([200, 3, 100])
    runs = [launched(b, 1.0, 0.95, EPS) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_two_launches(monkeypatch: pytest.MonkeyPatch):
    """Mask, bootstrap, returns and whitening in two."""
    count = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            count.append(grid)
            return self.kernel[grid]

    for name in ("gae_carry_kernel", "gae_kernel"):
        monkeypatch.setattr(triton_gae, name, Counted(getattr(triton_gae, name)))
    launched(batch([100]), 1.0, 0.95, EPS)
    assert count == [(4,), (4,)]


def test_the_public_launcher_whitens_like_the_front_door():
    b = batch([50, 30])
    plain, returns = triton_gae.gae(*b, 1.0, 0.95)
    white, same = triton_gae.whitened_gae(*b, 1.0, 0.95, EPS)
    assert torch.equal(returns, same)
    assert b.mask is not None
    kept = plain[b.mask].double()
    expected = (kept - kept.mean()) / (kept.var(correction=0) + EPS).sqrt()
    torch.testing.assert_close(white[b.mask].double(), expected, rtol=1e-6, atol=1e-6)
