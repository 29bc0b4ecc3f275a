"""Which implementation of the seam runs: the only place that knows what is installed."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import cast

import torch

from rlhf_kernels.types import Backend

NAMES = ("eager", "native")


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot run here."""
    try:
        return importlib.import_module(f"rlhf_kernels.backends.{name}")
    except ImportError as error:
        return f"cannot be imported: {error}"


def backends() -> dict[str, str]:
    """What can run here: each backend's name with ``"ok"`` or why not.

    >>> rk.backends()["eager"]
    'ok'
    """
    return {name: found if isinstance(found := _load(name), str) else "ok" for name in NAMES}


@functools.cache
def _say_once(why: str) -> None:
    warnings.warn(f"rlhf_kernels runs on the backend 'eager': 'native' {why}", stacklevel=2)


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name. An explicit name that cannot run raises; ``"auto"`` falls back to eager and says so."""
    name = os.environ.get("RLHF_KERNELS_BACKEND", "auto") if name == "auto" else name
    if name == "auto":
        if device.type != "cpu" or dtype == torch.float64:
            return cast(Backend, _load("eager"))
        native = _load("native")
        if isinstance(native, str):
            _say_once(native)
            return cast(Backend, _load("eager"))
        return cast(Backend, native)
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, wants 'auto', {' or '.join(map(repr, NAMES))}")
    found = _load(name)
    if isinstance(found, str):
        raise RuntimeError(f"backend: {name!r} {found}")
    if name == "native" and device.type != "cpu":
        raise RuntimeError(f"backend: 'native' runs on cpu, the tensors are on {device}")
    return cast(Backend, found)
