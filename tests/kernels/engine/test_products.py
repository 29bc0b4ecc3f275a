"""How many matrix products a call takes: counted by torch on the backend that multiplies with torch.

One product is [rows, H] times [H, V]: logits, gradient of the hidden states, gradient of the weight. How rows are cut
and which of them come back is the engine's, the same on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rlhf_kernels as rk
from rlhf_kernels.backends import eager
from rlhf_kernels.engine import call
from rlhf_kernels.types import Head, Tile
from tests.contracts.test_every_loss import every_loss
from tests.support.problems import PAIRS, Problem, make_problem

P = make_problem(seed=52, lengths=PAIRS, silent_sequences=2)
KEPT = int(P.kept.sum())
LONGEST = 15  # rows of the largest pair; what of it is kept is less
LOSSES = every_loss(P)
WHOLE = pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo", "simpo"])  # need a pair or a sequence at once


def room_for(rows: int) -> int:
    """``max_bytes`` under which so many rows may hold their logits."""
    head = Head(P.weight)
    return rows * eager.residual_bytes(Tile(P.hidden[:0], head, torch.empty(0, 1, dtype=torch.int64), 1.0))


def products(step: Callable[..., Any], p: Problem = P, frozen: str = "") -> float:
    """Rows that a call multiplies with the head, forward and back, in products of all kept rows."""
    x = {"hidden": p.hidden.clone(), "weight": p.weight.clone()}
    for leaf in x.keys() - {frozen}:
        x[leaf].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        step(x["hidden"], x["weight"]).backward()
    return counter.get_total_flops() / (2 * p.weight.numel() * KEPT)


def loss_of(name: str, **options: Any) -> Callable[..., Any]:
    loss, _, args = LOSSES[name]
    return lambda x, w: loss(x, w, P.targets, *args, backend="eager", **options).loss


@pytest.mark.parametrize("rows", [None, LONGEST])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_three_products_of_the_rows_that_need_them(name, rows):
    """Prompts and padding are in none of them; of PPO and GRPO clipped rows are in the first only."""
    taken = products(loss_of(name, max_bytes=rows and room_for(rows)))
    if name not in ("ppo", "grpo"):
        assert taken == 3
        return
    x = P.hidden.clone().requires_grad_()
    loss, _, args = LOSSES[name]
    loss(x, P.weight, P.targets, *args).loss.backward()
    assert x.grad is not None
    alive = int(x.grad.any(1).sum())
    assert 0 < alive < KEPT
    assert taken == 1 + 2 * alive / KEPT


@pytest.mark.parametrize("name", ["ppo", "grpo", "sft"])
def test_losses_over_tokens_compute_nothing_twice_in_the_smallest_pieces(name):
    assert products(loss_of(name, max_bytes=1)) == products(loss_of(name))


@WHOLE
def test_a_pair_beyond_the_budget_is_computed_twice_and_not_refused(name):
    assert 3 < products(loss_of(name, max_bytes=room_for(2))) <= 4


def test_statistics_remember_half_of_a_budget_that_is_too_small():
    def stats(rows: int | None) -> Callable[..., Any]:
        options = {"backend": "eager", "max_bytes": rows and room_for(rows)}
        return lambda x, w: rk.token_stats(x, w, P.targets, **options).logp.sum()

    assert products(stats(None)) == products(stats(KEPT)) == 3
    assert products(stats(KEPT // 2)) == 3 + (KEPT - KEPT // 4) / KEPT
    assert products(stats(1)) == 4


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_product(frozen):
    assert products(loss_of("sft"), frozen=frozen) == 2


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_tolerance_nothing_of_it_runs(name, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("nobody asked for a tolerance")

    for part in ("select", "multiply", "entries_bytes"):
        monkeypatch.setattr(eager, part, never)
    loss_of(name)(P.hidden.clone().requires_grad_(), P.weight).backward()
    with pytest.raises(AssertionError, match="nobody asked"):
        loss_of(name, tolerance=0.01)(P.hidden.clone().requires_grad_(), P.weight)


@pytest.mark.parametrize(("entries", "dense"), [(80, 0.0), (81, 1.0)])
def test_a_row_may_keep_an_eighth_of_its_columns(backend, entries, dense):
    """Of 640: its target has nine tenths of the probability, the others share the rest, and none of them may go."""
    z = torch.full((1, 640), -400.0)
    z[:, 1:entries] = math.log(0.1 / (entries - 1) / 0.9)
    z[:, 0] = 0.0
    z.requires_grad_()
    out = rk.sft_loss(z, torch.eye(640), torch.tensor([0]), tolerance=0.01, backend=backend)
    out.loss.backward()
    assert out.metrics["tolerance/dense"] == dense
    assert z.grad is not None
    assert z.grad.count_nonzero() == entries


def test_the_default_budgets_are_the_documented_ones():
    assert call.MAX_BYTES == {"cpu": 256 * 2**20}
    assert call.MAX_BYTES_GPU == 1.7e9
    head = Head(torch.empty(151_936, 896, device="meta"))
    each = eager.residual_bytes(Tile(torch.empty(0, 896), head, torch.empty(0, 1, dtype=torch.int64), 1.0))
    assert 400 <= call.MAX_BYTES["cpu"] // each < 450, "about 400 tokens"
