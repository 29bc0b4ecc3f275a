"""What ``prepare`` made elsewhere, put where this process and its children find it; in place of a network and of time.

A carried folder has ``wheels`` of peers, ``ext`` with the CUDA extension, and ``triton`` with compiled kernels. Each of
them is used if it fits this Python and this Triton; if not, the result says why, and the run goes on without.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.contenders.loading import FOLDERS

ABOUT = "about.json"  # beside the kernels: whose they are
OTHERS = ("tests", "scripts", "docs", "examples")  # folders that some wheels bring along, named like ours


def use(folder: Path) -> dict[str, Any]:
    """Use what is in the folder; call it before Triton compiles or a peer is imported.

    Returns:
        What was found of each part, or why it is not used.
    """
    work = Path(tempfile.mkdtemp(prefix="carried-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    found: dict[str, Any] = {}
    for name, part in (("wheels", wheels), ("ext", extension), ("triton", kernels)):
        try:
            found[name] = part(folder / name, work / name) if (folder / name).is_dir() else "none carried"
        except Exception as error:  # a run without is better than none
            found[name] = f"not used: {type(error).__name__}: {error}"
    return found


def wheels(source: Path, work: Path) -> list[str]:
    """Unpack them side by side, behind all that is installed."""
    names = []
    for path in sorted(source.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(work, [name for name in wheel.namelist() if name.split("/")[0] not in OTHERS])
        names.append("-".join(path.name.split("-")[:2]))
    before = os.environ.get(FOLDERS)
    os.environ[FOLDERS] = os.pathsep.join(filter(None, (before, str(work))))
    if str(work) not in sys.path:
        sys.path.append(str(work))
    importlib.invalidate_caches()
    return names


def extension(source: Path, work: Path) -> str:
    """Import the CUDA extension of this Python under its own name.

    Raises:
        ImportError: None of the files is for this Python, or the one that is cannot be loaded.
    """
    name = "rlhf_kernels._cuda"
    fits = [path for end in importlib.machinery.EXTENSION_SUFFIXES for path in source.glob(f"_cuda{end}")]
    if not fits:
        others = ", ".join(path.name for path in sorted(source.iterdir())) or "nothing"
        raise ImportError(f"none is for this Python, there is {others}")
    if importlib.util.find_spec(name) is not None:
        return "the installed one"
    spec = importlib.util.spec_from_file_location(name, fits[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    setattr(importlib.import_module("rlhf_kernels"), "_cuda", module)  # noqa: B010
    return fits[0].name


def kernels(source: Path, work: Path) -> dict[str, Any]:
    """Let Triton take its kernels from a copy of the carried cache, and leave new ones there."""
    about = json.loads((source / ABOUT).read_text())
    key = triton_key()
    if about["key"] != key:
        return {"not used": f"of another Triton: {about['key']} there, {key} here"}
    shutil.copytree(source, work)
    relocate(work)
    os.environ["TRITON_CACHE_DIR"] = str(work)
    agree(key)
    return about


def triton_key() -> str:
    """What makes a compiler, in words that do not depend on the Python that it was built for.

    Triton's own key has a hash of its compiled library, and wheels for two Pythons differ in it. Version and sources
    are the same; ptxas is in the other half of the key, by its version.
    """
    import triton

    root = Path(triton.__file__).parent
    folders = ("compiler", "backends", "language", "runtime")
    sources = [path for name in folders for path in sorted((root / name).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sources:
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{triton.__version__}-{digest.hexdigest()[:16]}"


def agree(key: str) -> None:
    """Let Triton find and leave kernels in its cache by this key of itself."""
    cache: Any = importlib.import_module("triton.runtime.cache")
    cache.triton_key = lambda: key


def relocate(folder: Path) -> None:
    """The cache names its files with their paths: make them those of this folder."""
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
