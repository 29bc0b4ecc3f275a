"""What only a GPU can show: the whole library on CUDA tensors, without waiting, on any stream, the same bits twice."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import table
from tests.support.problems import assert_gradient, assert_value

cuda = torch.device("cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch's deterministic mode refuses cuBLAS


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Any host synchronisation raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["strips", "fused"])
def _way(request, monkeypatch):
    listed = table.entry(cuda).by(request.param)
    monkeypatch.setattr(backend, "entry", lambda device: listed)


@pytest.fixture
def _as_users_run():
    """Not in torch's deterministic mode, in which it indexes by other means, and whoever allocates launches."""
    torch.use_deterministic_algorithms(False)


def problem(dtype=torch.bfloat16, n=300, size=128, vocab=5003, device=cuda):
    rng = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, size, generator=rng, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, size, generator=rng, device=device) * 4 / size**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (n,), generator=rng, device=device)
    advantages = torch.randn(n, generator=rng, device=device)
    with torch.no_grad():
        old = rk.token_stats(hidden, weight, targets).logp + 0.2 * torch.randn(n, generator=rng, device=device)
    return hidden, weight, targets, old, advantages


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_bytes", [None, 10**6])
def test_ppo_against_the_oracle(dtype, max_bytes):
    hidden, weight, targets, old, advantages = problem(dtype)
    targets[::7] = -100
    out = rk.ppo_loss(hidden, weight, targets, old, advantages, entropy_coef=0.01, max_bytes=max_bytes)
    out.loss.backward()
    values, grads = {}, {}
    for kind in (torch.float64, torch.promote_types(dtype, torch.float32), dtype):
        x, w = (t.detach().cpu().to(torch.float64 if kind == torch.float64 else dtype).requires_grad_()
                for t in (hidden, weight))  # fmt: skip
        args = (targets.cpu(), old.cpu(), advantages.cpu())
        loss = reference.ppo_loss(x, w, *args, entropy_coef=0.01, dtype=kind)
        loss.backward()
        values[kind], grads[kind] = loss.detach(), (x.grad, w.grad)
    upcast = torch.promote_types(dtype, torch.float32)
    assert_value("loss", out.loss.detach().cpu(), values[torch.float64], values[upcast], dtype)
    for i, (name, got) in enumerate((("hidden", hidden.grad), ("weight", weight.grad))):
        assert_gradient(name, got.cpu(), grads[torch.float64][i], grads[dtype][i], dtype)


@pytest.mark.usefixtures("_way", "_as_users_run")
def test_the_same_bits_twice():
    found = []
    for _ in range(2):
        hidden, weight, targets, old, advantages = problem()
        rk.ppo_loss(hidden, weight, targets, old, advantages).loss.backward()
        found.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("_way", "_as_users_run")
@pytest.mark.parametrize("checks", [True, False])
def test_nothing_waits_but_the_count_of_kept_rows(monkeypatch, checks):
    hidden, weight, targets, old, advantages = problem()
    bound = {"max_targets": len(targets), "checks": checks}
    rk.ppo_loss(hidden, weight, targets, old, advantages, **bound).loss.backward()  # compiles
    with nothing_waits():
        rk.ppo_loss(hidden, weight, targets, old, advantages, **bound).loss.backward()
    waits = []
    real = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: waits.append(1) or real(x))
    rk.ppo_loss(hidden, weight, targets, old, advantages, checks=checks).loss.backward()
    assert len(waits) == 1


@pytest.mark.usefixtures("_way", "_as_users_run")
def test_a_graph_captures_it():
    hidden, weight, targets, old, advantages = problem()
    targets[::3] = -100
    full = torch.zeros(weight.shape, device=cuda)

    def step():
        hidden.grad = None
        options = {"max_targets": len(targets), "weight_grad": full, "checks": False}
        rk.ppo_loss(hidden, weight, targets, old, advantages, **options).loss.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    full.zero_()
    graph.replay()
    torch.cuda.synchronize()
    captured = full.clone()
    full.zero_()
    step()
    assert torch.equal(captured, full)


@pytest.mark.usefixtures("_way", "_as_users_run")
def test_another_stream():
    expected = problem()
    rk.ppo_loss(*expected).loss.backward()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = problem()
        rk.ppo_loss(*got).loss.backward()
    side.synchronize()
    assert torch.equal(got[1].grad, expected[1].grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_current():
    rk.ppo_loss(*problem(device=torch.device("cuda:1"))).loss.backward()


@pytest.mark.usefixtures("_way", "_as_users_run")
@pytest.mark.parametrize("entropy", [0.0, 0.1])  # with it a pass over the exponentials makes their gradients
def test_more_than_two_to_the_31_logits(entropy):
    rows, vocab = 20_000, 131_072
    hidden = torch.randn(rows, 16, device=cuda, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, 16, device=cuda, dtype=torch.bfloat16)
    targets = torch.randint(vocab, (rows,), device=cuda)
    stats = rk.token_stats(hidden, weight, targets, max_bytes=20 * 10**9)
    (stats.logp.sum() + entropy * stats.entropy.sum()).backward()
    last = slice(rows - 64, rows)
    alone = hidden.detach()[last].clone().requires_grad_()
    few = rk.token_stats(alone, weight, targets[last])
    (few.logp.sum() + entropy * few.entropy.sum()).backward()
    assert torch.allclose(stats.logp[last], few.logp, rtol=1e-5, atol=1e-5)
    assert torch.allclose(hidden.grad[last].float(), alone.grad.float(), rtol=2e-2, atol=1e-3)


@pytest.mark.usefixtures("_as_users_run")
def test_memory_does_not_grow_with_the_logits():
    peaks = []
    for rows in (4096, 8192):
        hidden, weight, targets, old, advantages = problem(n=rows, size=256, vocab=151_936)
        rk.ppo_loss(hidden, weight, targets, old, advantages).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rk.ppo_loss(hidden, weight, targets, old, advantages).loss.backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    gradients = 151_936 * 256 * 6
    assert peaks[1] - gradients < 1.8e9
    assert peaks[1] - peaks[0] < 4096 * 151_936 * 2


def test_bad_rows_stay_alone_and_are_named_later():
    hidden, weight, targets, *_ = problem()
    targets[5] = 5003
    stats = rk.token_stats(hidden, weight, targets)
    assert stats.logp[5].isnan()
    assert stats.logp.isnan().sum() == 1
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="targets"):
        rk.token_stats(hidden, weight, targets.clamp(max=5002))
    rk.token_stats(hidden, weight, targets.clamp(max=5002))
