"""Ranks share the parts of a step; alone, nothing is summed."""

from __future__ import annotations

import torch

from trainer.base import ranks
from trainer.data.packing import within_budget


def test_a_rank_takes_every_second_part(monkeypatch):
    assert ranks.share("abc") == [(0, "a"), (1, "b"), (2, "c")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert ranks.share("abc") == [(1, "b")]
    assert len(within_budget([3, 3, 3, 3], max_tokens=100)) == 2, "and there is one for every rank"


def test_alone_nothing_is_summed():
    p = torch.nn.Parameter(torch.ones(2))
    ranks.sum_gradients([p])
    assert p.grad is None
    assert ranks.total({"a": 1.0}) == {"a": 1.0}
    assert ranks.spread("ab", str.upper) == ["A", "B"]
    assert ranks.from_first("x") == "x"
