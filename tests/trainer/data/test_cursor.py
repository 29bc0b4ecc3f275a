"""Batches of indices: each record once a pass, and the same ones after a stop."""

from __future__ import annotations

import pytest

from trainer.data.cursor import Cursor


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_a_pass_has_each_record_once(batch_size: int) -> None:
    cursor, seen = Cursor(count=5, batch_size=batch_size, seed=0), []
    for _ in range(20):
        batch = cursor.next()
        assert len(batch) == batch_size
        seen += batch
    passes = [seen[i : i + 5] for i in range(0, len(seen) - 4, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_a_seed_is_an_order() -> None:
    def order(seed: int) -> list[int]:
        return Cursor(count=50, batch_size=50, seed=seed).next()

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("steps", range(8))
def test_it_goes_on_where_it_stood(steps: int) -> None:
    cursor, again = (Cursor(count=7, batch_size=4, seed=3) for _ in range(2))
    for _ in range(steps):
        cursor.next()
    again.load_state_dict(cursor.state_dict())
    assert [cursor.next() for _ in range(9)] == [again.next() for _ in range(9)]


def test_places_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="count: got 0"):
        Cursor(count=0, batch_size=1, seed=0)
    cursor = Cursor(count=3, batch_size=2, seed=0)
    for state in ({"passes": 1, "left": 4}, {"passes": 1, "left": -1}):
        with pytest.raises(ValueError, match="state: got"):
            cursor.load_state_dict(state)
