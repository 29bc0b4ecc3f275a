"""Peers that are installed, and those whose wheels are merely unpacked into a folder.

RLHF_KERNELS_PEERS names one or more such folders, separated as in PATH. A package whose ``__init__`` wants more than a
machine has is entered without running it: its one module that matters is loaded alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import site
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDERS = "RLHF_KERNELS_PEERS"


def see_folders() -> None:
    """Let what is unpacked be imported, after all that is installed."""
    for folder in os.environ.get(FOLDERS, "").split(os.pathsep):
        if folder and folder not in sys.path:
            site.addsitedir(folder)  # last in the path: an unpacked wheel may bring folders named like ours


def module(name: str, bare: tuple[str, ...] = (), stubs: dict[str, dict[str, Any]] | None = None) -> ModuleType:
    """The peer's module of this name.

    Args:
        name: dotted.
        bare: packages on the way whose ``__init__`` is not run, if the whole cannot be imported.
        stubs: modules that take the place of real ones that cannot be imported, by their contents.

    Raises:
        ImportError: it is neither installed nor unpacked, or wants something that is not.
    """
    see_folders()
    if isinstance(sys.modules.get(name), _Stub):
        raise ImportError(f"{name} cannot be imported; a stub is in its place")
    try:
        found = importlib.import_module(name)
    except Exception as error:  # half-installed peers fail in many ways
        if not bare or importlib.util.find_spec(bare[0]) is None:
            raise ImportError(str(error)) from error
    else:
        _stand_in(stubs or {})  # some import when they run
        return found
    for half in [m for m in sys.modules if m == bare[0] or m.startswith(bare[0] + ".")]:
        del sys.modules[half]
    for package in bare:
        _enter(package)
    _stand_in(stubs or {}, bare)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"{type(error).__name__}: {error}") from error


class _Stub(ModuleType):
    """In the place of a module that cannot be imported."""


def _stand_in(stubs: dict[str, dict[str, Any]], bare: tuple[str, ...] = ()) -> None:
    """A package that is a mere folder can be imported, and has none of its contents."""
    for path, contents in stubs.items():
        try:
            if path in bare:
                raise ImportError(path)
            importlib.import_module(path)
        except Exception:
            sys.modules[path] = stub = _Stub(path)
            vars(stub).update(contents)


def _enter(package: str) -> None:
    """Put a package into place as a mere folder."""
    parent, _, last = package.rpartition(".")
    if parent:
        folders = [str(Path(folder, last)) for folder in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(package)
        folders = list((spec and spec.submodule_search_locations) or ())
    found = ModuleType(package)
    found.__path__ = folders
    found.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    found.__spec__.submodule_search_locations = folders
    sys.modules[package] = found
    if parent:
        setattr(sys.modules[parent], last, found)
