"""Sums and groups over packed sequences, against loops in Python."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rlhf_kernels.segments import acting, group_layout, segment_sum, spread

CU = torch.tensor([0, 3, 3, 4, 9])  # the second sequence is empty
PIECES = [slice(int(a), int(b)) for a, b in pairwise(CU)]
X = torch.randn(9, generator=torch.Generator().manual_seed(0))


def test_sums_of_sequences_and_back() -> None:
    sums = segment_sum(X, CU)
    torch.testing.assert_close(sums, torch.stack([X[piece].sum() for piece in PIECES]))
    assert sums[1] == 0
    rows = spread(sums, CU, 9)
    for piece, value in zip(PIECES, sums, strict=True):
        assert (rows[piece] == value).all()


def test_long_sums_keep_their_digits() -> None:
    x = torch.full((100_000,), 0.1)
    assert segment_sum(x, torch.tensor([0, 100_000])).item() == x.double().sum().float().item()


def test_a_sequence_acts_where_the_mask_is_true() -> None:
    mask = torch.zeros(9, dtype=torch.bool)
    mask[[2, 8]] = True
    assert acting(CU, None).tolist() == [True, False, True, True]
    assert acting(CU, mask).tolist() == [True, False, False, True]


@pytest.mark.parametrize("groups", [2, torch.tensor([7, 7, -1, 3, -1, -1])], ids=["size", "ids"])
def test_members_of_a_group_stand_together_and_go_back_where_they_were(groups: int | torch.Tensor) -> None:
    scores = torch.arange(6.0)
    layout = group_layout(groups, scores)
    found = [set(row[member].tolist()) for row, member in zip(layout.gather(scores), layout.member, strict=True)]
    wanted = [{0, 1}, {2, 3}, {4, 5}] if isinstance(groups, int) else [{2, 4, 5}, {3}, {0, 1}]
    assert found == wanted
    assert torch.equal(layout.scatter(layout.gather(scores), 6), scores)
