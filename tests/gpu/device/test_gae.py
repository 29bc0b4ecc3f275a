"""Packed advantages on a GPU, by Triton and by CUDA, against float64 and against each other."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.backends import gae as torch_gae

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

EPS = 1e-8
PACKINGS = {
    "ragged": [5, 0, 1, 30, 0, 700, 3333, 0, 1024, 1],
    "128 x 4096": [4096] * 128,
    "one of a million": [1_000_000],
    "many short": [1, 2, 3, 0] * 50_000,
    "one row": [1],
    "nothing": [0, 0],
}


@pytest.fixture(params=["triton_gae", "cuda_gae"])
def gae(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(f"rlhf_kernels.backends.{request.param}")


def batch(lengths: list[int], dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    rewards, values = (torch.randn(2, n, generator=g, dtype=torch.float64) + torch.tensor([[0.0], [3.0]])).to(dtype)
    mask = torch.rand(n, generator=g) >= 0.3
    rewards, values = rewards.where(mask, torch.nan), values.where(mask, torch.nan)
    bootstrap = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return [x.to(device) for x in (rewards, values, cu_seqlens, mask, bootstrap)]


def in_float64(given: list[Tensor], gamma: float, lam: float, whiten: bool) -> tuple[list[Tensor], list[float]]:
    """The torch expression in float64, which the CPU's tests hold to the oracle; and the scales summed at."""
    wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in given]
    advantages, returns = torch_gae.gae(*wide, gamma, lam)
    scales = [max(returns.abs().max().item(), 1.0) if returns.numel() else 1.0] * 2
    if whiten and returns.numel():
        scales[0] /= max(advantages[wide[3]].std(correction=0).nan_to_num().item(), EPS**0.5)
        advantages = reference.whiten(advantages, wide[3], eps=EPS)
    return [advantages, returns], scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("whiten", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_any_packing(gae: ModuleType, lengths: list[int], whiten: bool, dtype: torch.dtype):
    given = batch(lengths, dtype)
    for gamma, lam in ((0.99, 0.95), (1.0, 1.0)):
        got = gae.whitened_gae(*given, gamma, lam, EPS) if whiten else gae.gae(*given, gamma, lam)
        for x, want, scale in zip(got, *in_float64(given, gamma, lam, whiten), strict=True):
            assert x.dtype == dtype
            if x.numel():
                error = (x.cpu().double() - want).abs().max().item()
                # float64 is its own oracle's equal: both err with the depth of the sum
                ulps = 8 if dtype == torch.float32 else 256
                assert error <= ulps * torch.finfo(dtype).eps * max(scale, want.abs().max().item())


def test_neither_mask_nor_bootstrap(gae: ModuleType):
    rewards, values, cu_seqlens, *_ = batch([100, 0, 3000])
    given = [rewards.nan_to_num(), values.nan_to_num(), cu_seqlens.int(), None, None]
    exact = torch_gae.gae(*(x.double() if x is not None and x.is_floating_point() else x for x in given), 1.0, 0.95)
    for x, want in zip(gae.gae(*given, 1.0, 0.95), exact, strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_reward_stays_in_its_sequence(gae: ModuleType, bad: float):
    given = batch([1500, 40, 1500])
    clean = gae.gae(*given, 1.0, 0.95)
    given[3][1520] = True
    given[0][1520], given[1][1520] = bad, 0.0
    for x, y in zip(gae.gae(*given, 1.0, 0.95), clean, strict=True):
        assert torch.equal(x[:1500], y[:1500])
        assert torch.equal(x[1540:], y[1540:])
        assert not x[1520].isfinite()


def test_runs_are_bitwise_equal(gae: ModuleType):
    given = batch([700_000, 3, 100_000])
    first = [x.clone() for x in gae.whitened_gae(*given, 1.0, 0.95, EPS)]
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, gae.whitened_gae(*given, 1.0, 0.95, EPS), strict=True))


def test_on_another_stream_without_waiting(gae: ModuleType):
    """The rows are written late on the stream; who launches elsewhere reads what was there before."""
    given = batch([300_000])
    want = gae.whitened_gae(*given, 1.0, 0.95, EPS)
    late = [torch.zeros_like(x) for x in given]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(50_000_000)
            for x, y in zip(late, given, strict=True):
                x.copy_(y)
            got = gae.whitened_gae(*late, 1.0, 0.95, EPS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_captured_in_a_graph(gae: ModuleType):
    given = batch([4096] * 16)
    gae.whitened_gae(*given, 1.0, 0.95, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gae.whitened_gae(*given, 1.0, 0.95, EPS)
    given[0].mul_(2.0)
    graph.replay()
    want = gae.whitened_gae(*given, 1.0, 0.95, EPS)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_two_launches(gae: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # each fill is a launch
    given = batch([4096] * 16)
    gae.whitened_gae(*given, 1.0, 0.95, EPS)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gae.whitened_gae(*given, 1.0, 0.95, EPS)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_the_current_one(gae: ModuleType):
    want = gae.gae(*batch([5000, 3]), 1.0, 0.95)
    got = gae.gae(*batch([5000, 3], device="cuda:1"), 1.0, 0.95)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(x, y.cpu().to(x.device)) for x, y in zip(want, got, strict=True))


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < 60 << 30, reason="wants 60 GiB")
def test_beyond_two_to_the_31_rows(gae: ModuleType):
    n = 2**31 + 4097
    rewards, values = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    rewards[-1], rewards[5] = 3.0, 1.0
    cu_seqlens = torch.tensor([0, 10, n], device="cuda")
    advantages, returns = gae.gae(rewards, values, cu_seqlens, None, None, 1.0, 1.0)
    assert (advantages[0], advantages[6]) == (1, 0)
    assert {advantages[i].item() for i in (10, n // 2, n - 1)} == {3.0}
    assert torch.equal(advantages[-5000:], returns[-5000:])


def test_the_front_door_takes_the_best_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch):
    rewards, values, cu_seqlens, mask, bootstrap = batch([4096] * 8)
    rewards, values = rewards.nan_to_num(), values.nan_to_num()
    options = {"mask": mask, "bootstrap": bootstrap, "gamma": 0.99, "lam": 0.95, "whiten": True}
    rk.gae(rewards, values, cu_seqlens, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = rk.gae(rewards, values, cu_seqlens, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    backend = importlib.import_module("rlhf_kernels.backends.triton_gae")
    want = backend.whitened_gae(rewards, values, cu_seqlens, mask, bootstrap, 0.99, 0.95, EPS)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "eager")
    for x, y in zip(rk.gae(rewards, values, cu_seqlens, **options), got, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
