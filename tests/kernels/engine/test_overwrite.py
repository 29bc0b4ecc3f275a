"""Ready logits: columns that do not exist, and a gradient that takes their place."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk


def logits(dtype=torch.float32, n=9, vocab=301):
    return (3 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(0))).to(dtype)


def gradient(z, targets, weights, **options):
    leaf = z.clone().requires_grad_()
    made = leaf * 1.0  # as a model's head would, so that they are not a leaf
    stats = rk.token_stats_from_logits(made, targets, **options)
    loss = (weights * stats.logp).sum() + 0.1 * stats.entropy.sum()
    return made, leaf, loss


@pytest.mark.parametrize("most", [None, 7, 9], ids=["counted", "at most 7", "at most 9"])
@pytest.mark.parametrize("ignored", [[], [0, 4], [3, 4], list(range(9))], ids=str)
def test_it_is_the_same_gradient_in_the_same_memory(backend, dtype, ignored, most):
    if most == 7 and len(ignored) < 2:
        pytest.skip("more targets than that")
    targets = torch.arange(9)
    targets[ignored] = -100
    weights = torch.randn(9)
    weights[5] = 0.0  # rows without a gradient are overwritten too
    found = {}
    for overwrite in (False, True):
        options = {"overwrite": overwrite, "max_targets": most, "backend": backend}
        made, leaf, loss = gradient(logits(dtype), targets, weights, **options)
        loss.backward()
        found[overwrite] = leaf.grad
        assert torch.equal(made.detach(), leaf.grad) == overwrite
    tolerance = torch.finfo(dtype).eps
    assert not found[True][ignored].any()
    assert torch.allclose(found[True].float(), found[False].float(), rtol=tolerance, atol=1e-6)


def test_whoever_else_kept_the_logits_hears_of_it(backend):
    made = logits().requires_grad_() * 1.0
    earlier = made.square().sum()  # its backward comes after
    stats = rk.token_stats_from_logits(made, torch.arange(9), overwrite=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stats.logp.sum() + earlier).backward()


def test_a_second_backward_is_refused(backend):
    _, _, loss = gradient(logits(), torch.arange(9), torch.ones(9), overwrite=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace|overwrite: got a second backward"):
        loss.backward()


def test_memory_that_is_not_theirs_is_refused():
    with pytest.raises(ValueError, match=r"logits: got .* wants contiguous memory to overwrite"):
        rk.token_stats_from_logits(logits()[:, ::2], torch.zeros(9, dtype=torch.int64), overwrite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ready_logits_obey_vocab_size(backend, dtype):
    """As a head does: columns beyond it do not exist, and have a gradient of zero, whatever they hold."""
    g, some = torch.Generator().manual_seed(8), torch.tensor([1, 2, -100, 3, 8, -100])
    logits, bias = torch.randn(6, 9, generator=g).to(dtype), torch.randn(9, generator=g).to(dtype)
    for filler in (7.0, float("nan")):
        padded = logits.clone()
        padded[:, 5:] = filler
        leaf, short = padded.requires_grad_(), logits[:, :5].clone().requires_grad_()
        targets = some.clamp(max=4)
        ours = rk.token_stats_from_logits(leaf, targets, vocab_size=5, bias=bias, backend=backend)
        expected = rk.token_stats_from_logits(short, targets, bias=bias[:5], backend=backend)
        for a, b in zip(ours[:5], expected[:5], strict=True):
            assert torch.equal(a, b)
        (ours.logp + ours.entropy).sum().backward()
        (expected.logp + expected.entropy).sum().backward()
        assert torch.equal(leaf.grad[:, :5], short.grad)
        assert not leaf.grad[:, 5:].any()
    with pytest.raises(ValueError, match=r"^targets: got ids from 1 to 8, wants 0 to 4"):
        rk.token_stats_from_logits(logits, some.abs().clamp(max=8), vocab_size=5)
    with pytest.raises(ValueError, match=r"^overwrite: "):
        rk.token_stats_from_logits(logits, targets, vocab_size=5, overwrite=True)
    for wrong in (0, 10, 2.0):
        with pytest.raises(ValueError, match=r"^vocab_size: "):
            rk.token_stats_from_logits(logits, targets, vocab_size=wrong)
