"""What `doctor` finds out by looking and by trying; it needs torch and takes about a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

import rlhf_kernels as rk
from trainer.doctor import GB, Machine, cores, free_disk, installed, python_version

SIZE = 768  # of the matrices: large enough for the speed of the machine, small enough for a tenth of a second
CGROUP = Path("/sys/fs/cgroup")


def examine(out: Path) -> Machine:
    """Looks at the machine.

    Args:
        out: Where runs will be written; need not exist.
    """
    memory, free = _memory(Path("/proc/meminfo"), CGROUP)
    spin = next(
        (f"{name}={os.environ[name]}" for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ), ""
    )
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    versions = {"python": python_version(), "torch": torch.__version__, "rlhf_kernels": _own_version()} | installed()
    return Machine(
        versions=versions, backends=dict(rk.backends()), gpus=gpus, cores=cores(), quota=quota(CGROUP),
        load=os.getloadavg()[0], threads=torch.get_num_threads(), spin=spin or "the default, which is long",
        memory=memory, free_memory=free, free_disk=free_disk(out), folder=str(out),
        matmul={str(dtype).removeprefix("torch."): _speed(dtype) for dtype in (torch.float32, torch.bfloat16)},
        region=_regions(), isa=_isa(),
    )  # fmt: skip


def _isa() -> str:
    if rk.backends()["native"] != "ok":
        return ""
    return import_module("rlhf_kernels._C").isa()


def quota(folder: Path) -> float | None:
    """Processors that a control group (version 2) grants; None without a limit."""
    try:
        limit, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _memory(meminfo: Path, cgroup: Path) -> tuple[float, float]:
    """GB in all and free, under the limit of the control group where there is one."""
    try:
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, free = (int(rows[name].split()[0]) * 1024 / GB for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return float("nan"), float("nan")
    try:
        limit = int((cgroup / "memory.max").read_text()) / GB
        used = int((cgroup / "memory.current").read_text()) / GB
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, max(limit - used, 0.0))


def _best(work: Callable[[], object], times: int) -> float:
    """Seconds of the quickest of several tries."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def _speed(dtype: torch.dtype) -> float:
    """Gflop/s on the CPU."""
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    return 2 * SIZE**3 / _best(lambda: a @ a, 5) / 1e9


def _regions() -> tuple[float, float]:
    """Median-like milliseconds of an operation just large enough to be shared, with one thread and with all."""
    x, threads = torch.ones(70_000), torch.get_num_threads()

    def typical() -> float:
        found = []
        for _ in range(60):
            began = time.perf_counter()
            x.add_(1.0)
            found.append(time.perf_counter() - began)
        return sorted(found)[45] * 1e3  # the upper quartile: waiting shows in the slow ones

    try:
        torch.set_num_threads(1)
        one = typical()
        torch.set_num_threads(threads)
        return one, typical()
    finally:
        torch.set_num_threads(threads)


def _own_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("rlhf_kernels")
    except metadata.PackageNotFoundError:
        return "not installed, run from its folder"
