"""Where a stage stands in its data."""

from __future__ import annotations

import random


class Cursor:
    """Batches of indices without end: a new permutation for every pass, each record once per pass.

    Two integers say where it stands, so it can be put back there.

    Args:
        count: Records; at least one.
        batch_size: Indices per batch.
        seed: Of the permutations.

    Example:
        >>> cursor = Cursor(count=5, batch_size=2, seed=0)
        >>> seen = [cursor.next() for _ in range(4)]
        >>> again = Cursor(count=5, batch_size=2, seed=0)
        >>> again.load_state_dict(cursor.state_dict())
        >>> again.next() == cursor.next()
        True
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"count: got {count}, want at least one record")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._restart()

    def _restart(self) -> None:
        self._source, self._pool, self._passes = random.Random(self.seed), [], 0

    def _another_pass(self) -> None:
        self._pool += self._source.sample(range(self.count), self.count)
        self._passes += 1

    def next(self) -> list[int]:
        """The next batch."""
        while len(self._pool) < self.batch_size:
            self._another_pass()
        batch, self._pool = self._pool[: self.batch_size], self._pool[self.batch_size :]
        return batch

    def state_dict(self) -> dict[str, int]:
        """Passes begun, and indices drawn for them that no batch has had yet."""
        return {"passes": self._passes, "left": len(self._pool)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where another cursor of the same arguments stood.

        Raises:
            ValueError: If there is no such place.
        """
        passes, left = state["passes"], state["left"]
        if not 0 <= left <= passes * self.count:
            raise ValueError(f"state: got {state}, want left between 0 and passes * {self.count} records")
        self._restart()
        for _ in range(passes):
            self._another_pass()
        self._pool = self._pool[len(self._pool) - left :]
