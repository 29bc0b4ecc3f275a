"""What a machine has for training: packages, kernels, processors, memory and disk."""

from __future__ import annotations

import math
import os
import platform
import shutil
import timeit
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, NamedTuple

GB = 1e9
OPTIONAL = {
    "transformers": "every stage", "safetensors": "every stage", "tyro": "the command line", "yaml": "recipes",
    "rich": "moving progress bars", "pyarrow": "parquet files", "tensorboard": "curves with --log-to tensorboard",
    "wandb": "curves with --log-to wandb", "trackio": "curves with --log-to trackio",
    "triton": "GPU kernels", "flash_attn": "fast packed attention on GPUs",
}  # fmt: skip
PACKAGE = {"yaml": "pyyaml", "flash_attn": "flash-attn"}  # These have another name on the package index.
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # In a container, this group is its own.


class Machine(NamedTuple):
    """What was found. Sizes are GB, and not a number where the system does not tell."""

    versions: dict[str, str]  # of Python, torch, rlhf_kernels and the optional packages; empty where one is missing
    backends: dict[str, str]  # as rk.backends(): "ok", or why not
    gpus: list[str]
    cores: int  # logical processors that this process may use
    quota: float | None  # processors that the control group grants, where it sets a limit
    load: float  # average of the last minute
    threads: int  # that torch uses
    memory: float
    free_memory: float
    free_disk: float
    folder: str  # whose disk was asked
    bfloat16: float  # speed of a product of matrices on the CPU, relative to float32
    isa: str = ""  # the instruction set of the C++ kernels; empty where they do not run


def examine(out: Path) -> Machine:
    """Looks at this machine, in about a second.

    Args:
        out: Where runs will be written; need not exist.
    """
    import torch

    import rlhf_kernels as rk

    backends, (memory, free) = dict(rk.backends()), memory_of(MEMINFO, CGROUP)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlhf_kernels": _version("rlhf_kernels"),
    }
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    return Machine(
        versions=versions | {name: _version(name) if util.find_spec(name) else "" for name in OPTIONAL},
        backends=backends, gpus=[torch.cuda.get_device_name(i) for i in gpus],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota=quota(CGROUP), load=os.getloadavg()[0],
        threads=torch.get_num_threads(), memory=memory, free_memory=free,
        free_disk=shutil.disk_usage(there).free / GB, folder=str(out),
        bfloat16=_seconds(torch.float32) / _seconds(torch.bfloat16),
        isa=import_module("rlhf_kernels._C").isa() if backends["native"] == "ok" else "",
    )  # fmt: skip


def quota(group: Path) -> float | None:
    """Processors that a control group (version 2) grants; None without a limit."""
    try:
        limit, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def memory_of(meminfo: Path, group: Path) -> tuple[float, float]:
    """GB in all and free, under the limit of the control group (version 2) where there is one.

    A container sees the memory of its host. Pages of files that the group has not read for a while count as free: the
    system takes them back before it ends a process.
    """
    try:
        total, free = (1024 * _number(meminfo, f"{name}:") / GB for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return math.nan, math.nan
    try:
        limit, used = (int((group / name).read_text()) / GB for name in ("memory.max", "memory.current"))
        used -= _number(group / "memory.stat", "inactive_file") / GB
    except (OSError, KeyError, ValueError):  # There is no such group, or its limit is the word max.
        return total, free
    return min(total, limit), min(free, max(limit - used, 0.0))


def _number(path: Path, name: str) -> int:
    """Behind a name in a file of the system."""
    return int(dict(line.split()[:2] for line in path.read_text().splitlines())[name])


def _seconds(dtype: Any) -> float:
    """Of a product of matrices that are large enough for the speed of the processor."""
    import torch

    return min(timeit.repeat("a @ a", globals={"a": torch.ones(768, 768, dtype=dtype)}, number=1, repeat=6))


def _version(name: str) -> str:
    try:
        return metadata.version(PACKAGE.get(name, name))
    except metadata.PackageNotFoundError:
        return "unknown version"
