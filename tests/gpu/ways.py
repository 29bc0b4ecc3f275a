"""Which way the Triton backend goes in a test, and how a test with CPU tensors reaches a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import table
from rlhf_kernels.engine import call


def choose(way: str, monkeypatch: pytest.MonkeyPatch, *, ferried: bool) -> None:
    """``way`` is "fused" or "strips"."""
    if ferried:
        listed = table.entry(torch.device("cuda")).by(way)
        monkeypatch.setattr(call, "resolve", lambda name, device, dtype: ferry())
    else:
        listed = table.INTERPRETED.by(way)
    monkeypatch.setattr(backend, "entry", lambda device: listed)


def moved(x: Any, device: str) -> Any:
    """Tensors, wherever they are in tuples and dataclasses of ours, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(y, device) for y in x))
    if hasattr(x, "__dataclass_fields__"):
        return type(x)(**{name: moved(getattr(x, name), device) for name in x.__dataclass_fields__})
    return x


def ferry(device: str = "cuda") -> Any:
    """The backend behind the same functions: tiles go over to ``device``, results come back."""

    def score(tile):
        return moved(backend.score(moved(tile, device)), "cpu")

    def forward(tile):
        stats, residual = backend.forward(moved(tile, device))
        return moved(stats, "cpu"), residual

    def backward(tile, residual, stats, grads, rows, sinks):
        there = moved(sinks, device)
        backend.backward(
            moved(tile, device), residual, moved(stats, device), moved(grads, device), moved(rows, device), there
        )
        for mine, filled in zip(sinks, there, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(filled)

    def residual_bytes(tile):
        return backend.residual_bytes(tile)

    def select(tile, residual, stats, grads, rows, tolerance):
        there = (moved(x, device) for x in (stats, grads, rows))
        found = backend.select(moved(tile, device), residual, *there, tolerance)
        return moved(found._replace(kept=None), "cpu")._replace(kept=found.kept)

    def multiply(tile, entries, sinks):
        there = moved(sinks, device)
        backend.multiply(moved(tile, device), moved(entries, device), there)
        for mine, filled in zip(sinks, there, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(filled)

    return SimpleNamespace(
        score=score, forward=forward, backward=backward, residual_bytes=residual_bytes, select=select,
        multiply=multiply, entries_bytes=backend.entries_bytes,
    )  # fmt: skip
