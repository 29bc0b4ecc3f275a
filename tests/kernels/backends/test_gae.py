"""GAE against the definition: sums over all later tokens, O(n^2), in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_kernels as rk
from rlhf_kernels import advantages as module
from rlhf_kernels.backends import gae as torch_gae


def definition(rewards, values, cu, gamma, lam, mask, bootstrap):
    """A[t] = sum over k of (gamma lam)^k delta[t+k], over the kept tokens of a sequence alone."""
    n = len(rewards)
    advantages, returns = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for s in range(len(cu) - 1):
        kept = [i for i in range(cu[s], cu[s + 1]) if mask[i]]
        v = [values[i].item() for i in kept] + [bootstrap[s].item()]
        delta = [rewards[i].item() + gamma * v[k + 1] - v[k] for k, i in enumerate(kept)]
        for k, i in enumerate(kept):
            advantages[i] = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(kept)))
            returns[i] = advantages[i] + values[i]
    return advantages, returns


def batch(lengths, seed=0, dtype=torch.float64, masked=0.3):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    mask = torch.rand(n, generator=g) >= masked
    rewards = torch.randn(n, generator=g, dtype=torch.float64).where(mask, 0.0).to(dtype)
    values = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    return rewards, values, cu, mask, torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)


RAGGED = [3, 0, 1, 17, 1, 0, 64, 5, 0]


def native_gae():
    native = pytest.importorskip("rlhf_kernels.backends.native", reason="the extension was not built")
    return native.gae


@pytest.fixture(params=["torch", "native"])
def gae(request, monkeypatch):
    """``rk.gae`` over each implementation."""
    chosen = torch_gae if request.param == "torch" else type("native", (), {"gae": staticmethod(native_gae())})
    monkeypatch.setattr(module, "resolve", lambda *_: chosen)
    return rk.gae


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_the_definition(gae, dtype, gamma, lam):
    rewards, values, cu, mask, bootstrap = batch(RAGGED, dtype=dtype)
    got = gae(rewards, values, cu, gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap)
    want = definition(rewards.double(), values.double(), cu, gamma, lam, mask, bootstrap.double())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for x, y in zip(got, want, strict=True):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
        assert not x[~mask].any()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_on_any_packing(lengths, seed, masked, gamma, lam):
    rewards, values, cu, mask, bootstrap = batch(lengths, seed, masked=masked)
    got = torch_gae.gae(rewards, values, cu.long(), mask, bootstrap, gamma, lam)
    for x, y in zip(got, definition(rewards, values, cu, gamma, lam, mask, bootstrap), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_both_implementations_agree_on_long_sequences():
    rewards, values, cu, mask, bootstrap = batch([4096, 1, 0, 3000, 777], dtype=torch.float32)
    a = native_gae()(rewards, values, cu.long(), mask, bootstrap, 1.0, 0.95)
    b = torch_gae.gae(rewards, values, cu.long(), mask, bootstrap, 1.0, 0.95)
    exact = torch_gae.gae(rewards.double(), values.double(), cu.long(), mask, bootstrap.double(), 1.0, 0.95)
    for x, y, truth in zip(a, b, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=1e-5, atol=3e-5)
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=3e-5)


def test_masked_rows_are_stepped_over_as_if_they_were_not_there(gae):
    """Tool output: neither its length nor the critic's opinion of it may leak into what the policy is paid."""
    rewards, values, cu, mask, bootstrap = batch([11, 8], dtype=torch.float32)
    full = gae(rewards, values, cu, gamma=0.9, mask=mask, bootstrap=bootstrap)
    kept = torch.tensor([0, int(mask[:11].sum()), int(mask.sum())])
    short = gae(rewards[mask], values[mask], kept, gamma=0.9, bootstrap=bootstrap)
    garbage = gae(rewards, values.masked_fill(~mask, math.nan), cu, gamma=0.9, mask=mask, bootstrap=bootstrap)
    for x, y, z in zip(full, short, garbage, strict=True):
        torch.testing.assert_close(x[mask], y)
        assert torch.equal(x, z)


def test_truncation_differs_from_termination_by_the_bootstrap(gae):
    """A reply cut off at the length limit did not earn zero from there on."""
    rewards, values = torch.zeros(3), torch.tensor([0.5, 0.5, 0.5])
    cu, gamma, lam = torch.tensor([0, 3]), 0.9, 0.8
    ended = gae(rewards, values, cu, gamma=gamma, lam=lam)[0]
    cut = gae(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=torch.tensor([2.0]))[0]
    reach = torch.tensor([(gamma * lam) ** 2, gamma * lam, 1.0]) * gamma * 2.0
    torch.testing.assert_close(cut - ended, reach)


def test_the_bootstrap_follows_the_last_kept_row(gae):
    got = gae(
        torch.zeros(3),
        torch.tensor([1.0, 2.0, 9.0]),
        torch.tensor([0, 3]),
        lam=0.0,
        mask=torch.tensor([True, True, False]),
        bootstrap=torch.tensor([5.0]),
    )
    assert got[0].tolist() == [1.0, 3.0, 0.0]
    assert got[1].tolist() == [2.0, 5.0, 0.0]


def test_empty_batches(gae):
    empty = torch.zeros(0)
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        advantages, returns = gae(empty, empty, cu, whiten=True)
        assert advantages.shape == returns.shape == (0,)


def test_two_runs_are_bitwise_equal(gae):
    rewards, values, cu, mask, bootstrap = batch([500, 900], dtype=torch.float32)
    runs = [gae(rewards, values, cu, mask=mask, bootstrap=bootstrap, whiten=True)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_returns_are_taken_before_whitening(gae):
    rewards, values, cu, mask, _ = batch([5, 9], dtype=torch.float32)
    plain, returns = gae(rewards, values, cu, mask=mask)
    white, same = gae(rewards, values, cu, mask=mask, whiten=True)
    assert torch.equal(returns, same)
    torch.testing.assert_close(white, rk.whiten(plain, mask))
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_a_reward_on_a_masked_row_would_be_lost():
    args = torch.ones(2), torch.zeros(2), torch.tensor([0, 2])
    mask = torch.tensor([True, False])
    with pytest.raises(ValueError, match="rewards"):
        rk.gae(*args, mask=mask)
    assert rk.gae(*args, mask=mask, checks=False)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"values": torch.zeros(3)}, "values"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 2])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0])}, "cu_seqlens"),
        ({"mask": torch.ones(2)}, "mask"),
        ({"bootstrap": torch.ones(2)}, "bootstrap"),
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, "rewards"),
    ],
)
def test_gae_names_the_argument_that_is_wrong(change, name):
    good = {"rewards": torch.zeros(2), "values": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=rf"^{name}"):
        rk.gae(**{**good, **change})
