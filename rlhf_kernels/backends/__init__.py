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

NAMES = ("eager", "native", "triton")


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
def _say_once(name: str, why: str) -> None:
    warnings.warn(f"rlhf_kernels runs on the backend 'eager': {name!r} {why}", stacklevel=2)


def _cannot(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend that is there does not serve these tensors."""
    if name == "native" and device.type != "cpu":
        return f"runs on cpu, the tensors are on {device}"
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on cuda, the tensors are on {device}"
    if name == "triton" and dtype == torch.float64:
        return "computes in float32, the tensors are float64: use 'eager'"
    return None


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name. An explicit name that cannot run raises; ``"auto"`` falls back to eager and says so."""
    if not isinstance(name, str):
        raise ValueError(f"backend: got {name!r}, wants 'auto', {' or '.join(map(repr, NAMES))}")
    name = os.environ.get("RLHF_KERNELS_BACKEND", "auto") if name == "auto" else name
    if name == "auto":
        best = {"cpu": "native", "cuda": "triton"}.get(device.type)
        if best is None or dtype == torch.float64:
            return cast(Backend, _load("eager"))
        found = _load(best)
        if isinstance(found, str):
            _say_once(best, found)
            return cast(Backend, _load("eager"))
        return cast(Backend, found)
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, wants 'auto', {' or '.join(map(repr, NAMES))}")
    found = _load(name)
    why = found if isinstance(found, str) else _cannot(name, device, dtype)
    if why is not None:
        raise RuntimeError(f"backend: {name!r} {why}")
    return cast(Backend, found)
