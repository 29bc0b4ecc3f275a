"""Rows under an identity head: hidden states are logits, and ``hidden.grad`` is the gradient of the logits."""

from __future__ import annotations

import torch

import rlhf_kernels as rk

V = 7
CU = torch.tensor([0, 3, 5, 9, 10])  # four sequences


def rows(n=10, seed=0, scale=1.0):
    """Logits [n, V] (float64, leaf), targets [n], and a sampling policy's log-probabilities [n]."""
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, V, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(V, (n,), generator=g)
    noise = 0.4 * torch.randn(n, generator=g, dtype=torch.float64)
    return logits, targets, (logp_of(logits, targets) + noise).detach()


def logp_of(logits, targets, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]


EYE = torch.eye(V, dtype=torch.float64)


def same(out, expected, logits):
    """Equal value, and equal gradient of the logits."""
    loss = out.loss if isinstance(out, rk.LossOutput) else out
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    (got,) = torch.autograd.grad(loss, logits)
    (want,) = torch.autograd.grad(expected, logits, retain_graph=True)
    assert want.abs().max() > 1e-6, "the test would prove nothing"
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def per_sequence(x, cu=CU):
    return torch.stack([x[a:b].sum() for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)])


ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, -0.3, 0.7, -1.2, 2.0, -0.8], dtype=torch.float64)
