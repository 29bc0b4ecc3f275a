"""Ready logits whose gradient takes their place."""

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
