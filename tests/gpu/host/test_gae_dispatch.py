"""Whose advantages run where, and that the front door hands on what a backend can do itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import advantages as module
from rlhf_kernels.backends import gae as torch_gae

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXTENSION = SimpleNamespace(gae=None)


@pytest.mark.parametrize(
    ("backend", "device", "wish", "want"),
    [
        (SimpleNamespace(gae=print), CUDA, "auto", "its own"),
        (SimpleNamespace(), CUDA, "auto", "CUDA"),
        (SimpleNamespace(), CUDA, "eager", "torch"),
        (SimpleNamespace(), CPU, "auto", "torch"),
    ],
)
def test_the_rule(monkeypatch: pytest.MonkeyPatch, backend, device: torch.device, wish: str, want: str):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", wish)
    monkeypatch.setattr(torch_gae, "_cuda", lambda: EXTENSION)
    found = torch_gae.implementation(backend, device)
    assert found is {"its own": backend, "CUDA": EXTENSION, "torch": torch_gae}[want]


def test_without_the_extension_it_is_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(torch_gae, "_cuda", lambda: None)
    assert torch_gae.implementation(SimpleNamespace(), CUDA) is torch_gae


def test_a_backend_that_whitens_is_let_to(monkeypatch: pytest.MonkeyPatch):
    seen = []
    backend = SimpleNamespace(gae=torch_gae.gae, whitened_gae=lambda *args: seen.append(args) or ("A", "R"))
    monkeypatch.setattr(module, "resolve", lambda *_: backend)
    rewards, cu_seqlens = torch.ones(3), torch.tensor([0, 2, 3], dtype=torch.int32)
    assert rk.gae(rewards, rewards, cu_seqlens, gamma=0.9, lam=0.8, whiten=True) == ("A", "R")
    assert rk.gae(rewards, rewards, cu_seqlens)[0].shape == (3,)
    (args,) = seen
    assert args[5:] == (0.9, 0.8, 1e-8)
    assert args[2].dtype == torch.int64


def test_a_backend_that_shapes_rewards_is_let_to(monkeypatch: pytest.MonkeyPatch):
    seen = []
    backend = SimpleNamespace(gae=torch_gae.gae, shaped_rewards=lambda *args: seen.append(args) or ("r", "kl"))
    monkeypatch.setattr(module, "resolve", lambda *_: backend)
    x = torch.ones(3, dtype=torch.bfloat16)
    got = rk.shaped_rewards(x[:1], x, x.float(), torch.tensor([0, 3]), beta=0.5, kl="k3", kl_clip=2.0)
    assert got == ("r", "kl")
    assert [t.dtype for t in seen[0][:3]] == [torch.float32] * 3
    assert seen[0][5:] == (0.5, "k3", 2.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_in_torch_too_a_bad_reward_stays_in_its_sequence(bad: float):
    rewards, cu_seqlens = torch.ones(9), torch.tensor([0, 3, 6, 9])
    clean = torch_gae.gae(rewards, rewards, cu_seqlens, None, None, 1.0, 0.95)
    got = torch_gae.gae(rewards.index_fill(0, torch.tensor([4]), bad), rewards, cu_seqlens, None, None, 1.0, 0.95)
    for x, y in zip(got, clean, strict=True):
        assert x.isfinite().tolist() == [True] * 3 + [False, False, True] + [True] * 3
        assert torch.equal(x[[0, 1, 2, 5, 6, 7, 8]], y[[0, 1, 2, 5, 6, 7, 8]])


def test_cuda_refuses_what_is_not_on_a_gpu():
    cuda_gae = pytest.importorskip("rlhf_kernels.backends.cuda_gae", reason="built without nvcc")
    with pytest.raises(ValueError, match=r"values.*cpu"):
        cuda_gae.gae(torch.ones(3), torch.ones(3), torch.tensor([0, 3]), None, None, 1.0, 0.95)
