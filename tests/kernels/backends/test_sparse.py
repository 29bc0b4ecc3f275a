"""What a tolerance knows of gradients before it looks at them: from statistics, on the safe side of the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_kernels.backends import eager, sparse
from rlhf_kernels.types import Grads, Head, Reference, Tile

N, V, H = 12, 90, 8


def tile(kind: str, direction: str | None, ids: int, dtype: torch.dtype) -> Tile:
    rng = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, H, generator=rng), torch.randn(V, H, generator=rng)
    targets = torch.randint(V, (N, ids), generator=rng)
    extras, temperature = {}, 1.0
    if kind != "plain":
        bias = torch.randn(V, generator=rng).to(dtype)
        extras = {"bias": bias, "softcap": 3.0 if kind == "capped" else None, "logit_scale": -2.5}
        temperature = (0.3 + torch.rand(N, generator=rng)).to(dtype)
    head = Head(weight.to(dtype), **extras)
    ref = None
    if direction is not None:
        other = Head((weight + torch.randn(V, H, generator=rng)).to(dtype), **extras)
        ref = Reference(hidden.to(dtype), other, direction)
    return Tile(hidden.to(dtype), head, targets, temperature, ref)


def upstream(names: tuple[str, ...], ids: int, dtype: torch.dtype) -> Grads:
    rng = torch.Generator().manual_seed(4)
    given = {name: torch.randn(N, generator=rng).to(dtype) for name in names if name != "logp"}
    logp = torch.randn(N, ids, generator=rng).to(dtype)
    return Grads(logp if "logp" in names else torch.zeros_like(logp), **given)


def judged(given: Tile, grads: Grads) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the logits, and what is said of them."""
    stats, residual = eager.forward(given)
    whole = eager._grad_logits(given, residual, stats, grads, None, slice(0, V))
    log_q = None
    if residual.z_ref is not None:
        most, log_mass = residual.norm_ref
        log_q = residual.z_ref.gather(1, given.targets) - most[:, None] - log_mass[:, None]
    seen = sparse._at_targets(given, stats, grads, V, log_q)
    return whole.double(), seen, sparse._absolute_sum(given, stats, grads)


MIXTURES = [("logp",), ("entropy",), ("lse",), ("mean_logit",), ("logp", "entropy", "lse", "mean_logit")]


@pytest.mark.parametrize("kind", ["plain", "scaled", "capped"])
@pytest.mark.parametrize("ids", [1, 3])
@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
@pytest.mark.parametrize("direction", [None, "reverse", "forward"])
def test_targets_and_sums_from_statistics(kind, ids, names, direction):
    given = tile(kind, direction, ids, torch.float64)
    if direction is not None:
        names = (*names, "kl")
    grads = upstream(names, ids, torch.float64)
    whole, seen, most = judged(given, grads)
    at = torch.stack([whole[i, given.targets[i].unique()].abs().max() for i in range(N)])
    assert torch.allclose(seen, at, rtol=1e-9, atol=1e-12)
    assert (most >= whole.abs().sum(1) * (1 - 1e-9)).all()
    if names == ("logp",) and ids == 1 and kind == "plain":
        assert torch.allclose(most, whole.abs().sum(1), rtol=1e-5), "and no larger than it must be"


def test_a_probability_that_was_rounded_to_one():
    """The gradient of near certainty is not zero because its logarithm is."""
    z = torch.zeros(4, V)
    z[:, 5] = torch.tensor([19.0, 21.0, 24.0, 40.0])
    targets, upstream = torch.full((4, 1), 5), Grads(torch.ones(4, 1))
    stats, _ = eager.forward(Tile(z, Head(torch.eye(V)), targets, 1.0))
    most = sparse._absolute_sum(Tile(z, Head(torch.eye(V)), targets, 1.0), stats, upstream)
    p = z.double().softmax(1)
    assert (most >= 2 * (1 - p[:, 5])).all()
    assert stats.logp.eq(0).any(), "otherwise the test proves nothing"


def test_the_ids_of_a_row_may_be_the_same():
    given = tile("plain", None, 3, torch.float64)
    given.targets[:, 1] = given.targets[:, 0]
    whole, seen, most = judged(given, upstream(("logp",), 3, torch.float64))
    at = torch.stack([whole[i, given.targets[i].unique()].abs().max() for i in range(N)])
    assert torch.allclose(seen, at, rtol=1e-9)
    assert (most >= whole.abs().sum(1) * (1 - 1e-9)).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["logp", "entropy", "lse", "mean_logit"])
def test_nobody_loses_anything_beside_a_gradient_that_is_no_number(name, bad):
    given, grads = (
        tile("plain", None, 1, torch.float64),
        upstream(("logp", "entropy", "lse", "mean_logit"), 1, torch.float64),
    )
    getattr(grads, name)[3] = bad
    stats, _ = eager.forward(given)
    part = sparse.share(given, stats, grads, torch.arange(N), V, None, 0.1, V // 2)
    assert part.flat.tolist() == list(range(N))
    assert part.look.numel() == 0


def test_gradients_that_are_rounding_alone_leave_nothing_out():
    """A policy that is its own reference: the exact KL's gradient is zero but for the last bits of statistics."""
    given = tile("plain", "reverse", 1, torch.float32)
    assert given.reference is not None
    same = Reference(given.hidden, given.head)
    given = Tile(given.hidden, given.head, given.targets, 1.0, same)
    stats, _ = eager.forward(given)
    grads = Grads(torch.zeros(N, 1), kl=torch.ones(N))
    log_q = stats.logp + 1e-7 * torch.randn(N, 1, generator=torch.Generator().manual_seed(1))
    part = sparse.share(given, stats, grads, torch.arange(N), V, log_q, 0.1, V // 2)
    assert part.flat.numel() == N
