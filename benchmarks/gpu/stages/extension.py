"""The CUDA extension, compiled beside the first stages where it is not there yet and there is an nvcc."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.report.kernel_hash import ROOT

LOG = "build.log"
_building: list[subprocess.Popen[bytes]] = []


def there() -> bool:
    """Whether this process has one, built here or carried along."""
    return importlib.util.find_spec("rlhf_kernels._cuda") is not None


def start(folder: Path) -> None:
    """Begin to compile it, once for a run; what the compiler says is in ``folder``."""
    if there() or (folder / LOG).exists():
        return
    environment = os.environ | {
        "RLHF_KERNELS_EXT": "0",
        "RLHF_KERNELS_CUDA": "1",
    }  # A GPU's machine wants no CPU extension.
    with open(folder / LOG, "wb") as log:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        _building.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))


def wait(seconds: float) -> None:
    """Until it is compiled, or has failed, or so many seconds are over."""
    for process in _building:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(seconds, 0.0))
    importlib.invalidate_caches()
