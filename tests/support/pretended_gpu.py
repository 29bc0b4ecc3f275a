"""A plugin of pytest, -p tests.support.pretended_gpu: benchmarks take the CPU for a GPU, and ask it for its name."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest

_pretence = pytest.StashKey[ExitStack]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    from benchmarks.gpu import fake
    from benchmarks.measure import place, turns

    config.stash[_pretence] = stack = ExitStack()
    stack.enter_context(fake.faked())
    stack.enter_context(mock.patch.object(place, "place", return_value="cpu"))
    stack.enter_context(mock.patch.object(turns, "on_cuda", return_value=True))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_pretence].close()
