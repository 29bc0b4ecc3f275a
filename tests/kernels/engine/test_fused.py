"""The engine: a user's own objective, streamed in pieces of any size."""

from __future__ import annotations

from itertools import pairwise

import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.support.problems import Problem, assert_gradient, assert_value, leaves, make_problem, small_budget


def token_objective(stats, cu_seqlens, a, b):
    """Nothing anybody would train with, but it bends every statistic."""
    terms = a * stats.logp**2 + torch.tanh(b * stats.entropy) + 0.05 * stats.lse**2
    return terms.sum(), {"entropy": (stats.entropy.detach().sum(), stats.entropy.new_tensor(float(len(a))))}


def pair_objective(stats, cu_seqlens, a, w):
    """Sequences 2i and 2i + 1 are multiplied: only whole pairs give the right answer."""
    bounds = cu_seqlens.tolist()
    sums = torch.stack([(a * stats.logp)[i:j].sum() for i, j in pairwise(bounds)])
    lengths = cu_seqlens.diff()
    living = ((lengths[0::2] > 0) & (lengths[1::2] > 0)).to(sums.dtype)
    per_pair = w[0::2] * torch.tanh(0.05 * sums[0::2] * sums[1::2])
    return (per_pair * living).sum(), {"pairs": (living.sum(), living.new_ones(()))}


def materialised(objective, p: Problem, x, per_token, per_sequence, **kwargs) -> torch.Tensor:
    """The objective on all kept rows at once."""
    options = p.options | {k: v for k, v in x.items() if k == "bias"}
    stats = reference.token_stats(x["hidden"], x["weight"], p.targets, **options, **kwargs)
    kept = p.kept
    cu = torch.cat([torch.zeros(1, dtype=torch.long), kept.long().cumsum(0)])[p.cu_seqlens.long()]
    stats = reference.Stats(*(s[kept] for s in stats))
    return objective(stats, cu, *(t[kept].to(stats.logp.dtype) for t in per_token), *per_sequence)[0]


def compare(objective, p: Problem, per_token=(), per_sequence=(), budgets=(None,), **kwargs) -> None:
    dtype, results = p.hidden.dtype, {}
    for name, double, precision in (
        ("exact", True, torch.float64),
        ("upcast", False, torch.promote_types(dtype, torch.float32)),
        ("plain", False, dtype),
    ):
        x = leaves(p, torch.float64 if double else None)
        loss = materialised(objective, p, x, per_token, per_sequence, dtype=precision)
        (1.7 * loss).backward()
        results[name] = loss.detach(), {k: v.grad for k, v in x.items()}
    for max_bytes in budgets:
        x = leaves(p)
        options = p.options | {k: v for k, v in x.items() if k == "bias"}
        out = rk.fused_loss(
            x["hidden"], x["weight"], p.targets, objective,
            per_token=per_token, per_sequence=per_sequence, cu_seqlens=p.cu_seqlens, max_bytes=max_bytes,
            **options, **kwargs,
        )  # fmt: skip
        (1.7 * out.loss).backward()
        assert_value("loss", out.loss.detach(), results["exact"][0], results["upcast"][0], dtype)
        for k, v in x.items():
            assert_gradient(
                f"{k} (max_bytes={max_bytes})", v.grad, results["exact"][1][k], results["plain"][1][k], dtype
            )


def budgets(p: Problem) -> tuple[int | None, ...]:
    row = p.weight.shape[0] * 8
    return None, 3 * row, 11 * row, 40 * row


def test_own_objective_in_pieces_of_any_size(backend, dtype):
    p = make_problem(dtype, seed=11, temperature=0.8)
    p.options["bias"] = p.normal(301).to(dtype)
    a, b = p.per_token(p.normal(p.targets.numel())), p.per_token(p.normal(p.targets.numel()))
    compare(token_objective, p, (a, b), budgets=budgets(p), backend=backend)


def test_pairs_stay_together_in_pieces_of_any_size(backend, dtype):
    p = make_problem(dtype, seed=12, lengths=(5, 3, 8, 1, 0, 6, 9, 4, 4, 4), silent_sequences=2)
    a, w = p.per_token(p.normal(p.targets.numel())), p.normal(p.num_sequences)
    compare(pair_objective, p, (a,), (w,), budgets=budgets(p), unit=2, backend=backend)


def test_the_objective_sees_kept_rows_only(backend):
    p = make_problem(seed=13)
    number = torch.arange(p.targets.numel()).float()
    seen, boundaries = [], []

    def objective(stats, cu_seqlens, number, names):
        assert len(stats.logp) == len(number) == int(cu_seqlens[-1])
        assert len(names) == len(cu_seqlens) - 1
        seen.extend(number.tolist())
        boundaries.extend(zip(names.tolist(), cu_seqlens.diff().tolist(), strict=True))
        return stats.logp.sum(), {}

    rk.fused_loss(
        p.hidden, p.weight, p.targets, objective, per_token=(number,), per_sequence=(torch.arange(p.num_sequences),),
        cu_seqlens=p.cu_seqlens, max_bytes=small_budget(p), backend=backend,
    )  # fmt: skip
    assert sorted(set(seen)) == number[p.kept].tolist()
    bounds = p.cu_seqlens.tolist()
    lengths = {s: int(p.kept[i:j].sum()) for s, (i, j) in enumerate(pairwise(bounds))}
    assert {s: n for s, n in boundaries if n} == {s: n for s, n in lengths.items() if n}


def test_metrics_are_sums_over_counts(backend):
    p = make_problem(seed=14)
    a = torch.zeros(p.targets.shape)
    exact = reference.token_stats(p.hidden, p.weight, p.targets).entropy[p.kept].mean()
    for max_bytes in (None, small_budget(p)):
        out = rk.fused_loss(
            p.hidden, p.weight, p.targets, token_objective, per_token=(a, a), max_bytes=max_bytes, backend=backend
        )
        assert abs(out.metrics["entropy"].double() - exact) < 1e-5
        assert not out.metrics["entropy"].requires_grad
        assert not out.loss.requires_grad, "nothing required a gradient"


def test_rows_that_fit_beside_no_accumulator_are_taken_at_once(monkeypatch):
    """One span writes a bfloat16 gradient of the weight; several would hold it in float32 meanwhile."""
    from rlhf_kernels.backends import eager

    seen: list[int] = []
    forward = eager.forward

    def counted(tile):
        seen.append(len(tile.hidden))
        return forward(tile)

    monkeypatch.setattr(eager, "forward", counted)

    def spans(dtype: torch.dtype, rows: int, **options) -> list[int]:
        seen.clear()
        hidden, weight = torch.randn(rows, 64, dtype=dtype), torch.randn(4096, 64, dtype=dtype)
        hidden.requires_grad_(), weight.requires_grad_(options.pop("train_head", True))
        buffer = torch.zeros(4096, 64) if options.pop("buffer", False) else None
        budget = 4 * eager.residual_bytes(eager_tile)
        call = {"backend": "eager", "max_bytes": budget, "weight_grad": buffer}
        rk.sft_loss(hidden, weight, torch.arange(rows), **call).loss.backward()
        return list(seen)

    from rlhf_kernels.types import Head, Tile

    eager_tile = Tile(torch.empty(0, 64), Head(torch.empty(4096, 64)), torch.empty(0, 1, dtype=torch.long), 1.0)
    fit = 4 + 4 * 4096 * 64 // eager.residual_bytes(eager_tile)  # into the budget and V H 4 bytes
    assert spans(torch.bfloat16, fit) == [fit]
    assert max(spans(torch.bfloat16, fit + 1)) <= 4
    assert max(spans(torch.float32, fit)) <= 4
    assert max(spans(torch.bfloat16, fit, buffer=True)) <= 4
    assert max(spans(torch.bfloat16, fit, train_head=False)) <= 4
