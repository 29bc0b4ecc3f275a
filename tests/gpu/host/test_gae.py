"""The algorithm of the CUDA kernels, threads looped over on a CPU, against the float64 oracle.

What this leaves to a GPU is the shuffle, the ballot, the barriers and the launch.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_kernels import reference
from rlhf_kernels.backends import gae as torch_gae

TILE = 1024  # rows that a block takes at once
EPS = 1e-8
Gae = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def gae(tmp_path_factory: pytest.TempPathFactory) -> Gae:
    """(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, eps, tiles): as in the backends, and tiles a block."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("gae") / "gae_host.so"
    source = Path(__file__).with_name("gae_host.cpp")
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *checks, source, "-o", library], check=True)
    run = ctypes.CDLL(str(library)).gae_on_host

    def call(
        rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None,
        gamma: float, lam: float, eps: float = 0.0, tiles: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.full_like(values, torch.nan), torch.full_like(values, torch.nan)
        tensors = rewards, values, cu_seqlens, mask, bootstrap, *out
        at = (ctypes.c_void_p * 7)(*(0 if x is None else x.data_ptr() for x in tensors))
        sizes = (ctypes.c_int64(x) for x in (rewards.numel(), cu_seqlens.numel() - 1, tiles))
        run(ctypes.c_bool(values.dtype == torch.float64), at, *sizes, (ctypes.c_double * 3)(gamma, gamma * lam, eps))
        return out

    return call


def batch(lengths: list[int], dtype: torch.dtype = torch.float32, masked: float | None = 0.3) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    rewards, values = (torch.randn(2, n, generator=g, dtype=torch.float64) + torch.tensor([[0.0], [3.0]])).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    if masked is None:
        return [rewards, values, cu_seqlens, None, None]
    mask = torch.rand(n, generator=g) >= masked
    bootstrap = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    return [rewards.where(mask, torch.nan), values.where(mask, torch.nan), cu_seqlens, mask, bootstrap]


def assert_true(gae: Gae, given: list, gamma: float, lam: float, eps: float = 0.0, tiles: int = 0):
    """A few ulps from float64 at the scale of what is summed; for float64 the oracle errs as much as we do."""
    got = gae(*given, gamma, lam, eps, tiles)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    advantages, returns = torch_gae.gae(*wide, gamma, lam)
    scales = [max(returns.abs().max().item(), 1.0)] * 2
    if eps:
        kept = advantages if given[3] is None else advantages[given[3]]
        scales[0] /= max(kept.std(correction=0).item(), eps**0.5)
        advantages = reference.whiten(advantages, given[3], eps=eps)
    for x, want, scale in zip(got, (advantages, returns), scales, strict=True):
        error = (x.double() - want).abs().max().item()
        assert error <= 8 * torch.finfo(x.dtype).eps * max(scale, want.abs().max().item())


PACKINGS = {
    "ragged": [5, 0, 1, 30, 0, 700, 333, 0, 1024, 1],
    "one long": [5 * TILE + 3],
    "many short": [1, 2, 3, 0] * 500,
    "boundaries on tiles": [TILE, 2 * TILE, 0, 0, TILE, TILE - 1, 1],
    "long between short": [1, 0, 2, 3000, 0, 3],
    "one row": [1],
    "more sequences than three rounds of the search": [0] * 33000 + [7],
}


@pytest.mark.parametrize("eps", [0.0, EPS], ids=["plain", "whitened"])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_any_packing(gae: Gae, lengths: list[int], eps: float):
    assert_true(gae, batch(lengths), 0.97, 0.9, eps)


def test_the_oracle(gae: Gae):
    given = batch([100, 0, 37, 3])
    want = reference.gae(
        *given[:3], mask=given[3], bootstrap=given[4], gamma=0.9, lam=0.8, whiten=True  # type: ignore[misc]
    )  # fmt: skip
    for x, y in zip(gae(*given, 0.9, 0.8, EPS), want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_any_discount(gae: Gae, gamma: float, lam: float, dtype: torch.dtype):
    assert_true(gae, batch([700, 9, 0, 1400], dtype), gamma, lam, EPS)
    assert_true(gae, batch([700, 9, 0, 1400], dtype, masked=None), gamma, lam)


@pytest.mark.parametrize("tiles", [2, 3])
def test_blocks_of_several_tiles(gae: Gae, tiles: int):
    assert_true(gae, batch([3000, 0, 17, 5000]), 1.0, 1.0, EPS, tiles)


def test_as_many_blocks_as_there_may_be(gae: Gae):
    """Beyond 512 tiles a block walks two."""
    n = 513 * TILE
    given = torch.ones(n), torch.full((n,), 7.0), torch.tensor([0, n]), None, None
    advantages, returns = gae(*given, 1.0, 1.0)
    assert torch.equal(returns, torch.arange(n, 0, -1.0))
    assert torch.equal(advantages, returns - 7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_reward_stays_in_its_sequence(gae: Gae, bad: float):
    given = batch([1500, 40, 1500], masked=None)
    clean = gae(*given, 1.0, 0.95)
    given[0][1520] = bad  # type: ignore[index]
    for x, y in zip(gae(*given, 1.0, 0.95), clean, strict=True):
        assert torch.equal(x[:1500], y[:1500])
        assert torch.equal(x[1521:], y[1521:])
        assert not x[1500:1521].isfinite().any()


def test_what_reaches_no_row_may_be_infinite(gae: Gae):
    """The value after a sequence without mask, which lies across blocks, does not enter mean and variance."""
    given = batch([10, 4 * TILE, 30])
    given[3][10:-30] = False  # type: ignore[index]
    want = gae(*given, 1.0, 0.95, EPS)
    given[4][1] = torch.inf  # type: ignore[index]
    assert all(torch.equal(x, y) for x, y in zip(gae(*given, 1.0, 0.95, EPS), want, strict=True))


def test_nothing_kept(gae: Gae):
    for x in gae(*batch([1500, 0, 20], masked=1.1), 1.0, 0.95, EPS):
        assert not x.any()
