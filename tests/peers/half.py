"""One module of a package that cannot be imported whole, and nothing left behind for other tests to trip over."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from benchmarks.contenders.loading import module


def half(name: str, bare: tuple[str, ...], stubs: dict[str, dict[str, Any]] | None = None) -> ModuleType:
    """The module, as ``benchmarks.contenders.loading.module`` finds it; stand-ins for other packages go again."""
    stubs = stubs or {}
    before = {stub: sys.modules.get(stub) for stub in stubs}
    found = module(name, bare, stubs)
    for stub, real in before.items():
        if stub.split(".")[0] != bare[0]:
            if real is None:
                sys.modules.pop(stub, None)
            else:
                sys.modules[stub] = real
    return found
