"""Where something was measured, and the file that it goes into."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rlhf_kernels as rk
from benchmarks.contenders import ours
from benchmarks.contenders.loading import see_folders
from benchmarks.report.kernel_hash import ROOT

WATCHED_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")
PACKAGES = (
    "torch", "numpy", "trl", "liger-kernel", "verl", "transformers", "scipy", "triton", "quack-kernels",
    "cut-cross-entropy", "fla-core",
)  # fmt: skip


def commit() -> str | None:
    """Of the checkout, with a plus where the library or the benchmark differ from it."""
    if not (ROOT / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(ROOT)]
        found = subprocess.run([*ask, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["rlhf_kernels", "csrc", "benchmarks/*.py"]  # The pattern includes every folder in benchmarks.
        changed = subprocess.run([*ask, "diff", "--quiet", "HEAD", "--", *paths], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.returncode else "")


def instruction_set() -> str | None:
    """That of the native backend, which a machine's flags or RLHF_KERNELS_ISA decide; None without the extension."""
    return importlib.import_module("rlhf_kernels._C").isa() if rk.backends()["native"] == "ok" else None


def environment(threads: int, max_bytes: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Where this was measured. No date: the same machine and versions should give the same file."""
    versions = {"python": platform.python_version(), "rlhf_kernels": rk.__version__}
    see_folders()
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "commit": commit(),
        "versions": versions,
        "cpu": fields.get("model name", platform.processor()),
        # A virtual machine may not name its processor, but it numbers it.
        "cpu_model": ", ".join(f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields),
        "isa": instruction_set(),
        "cpu_flags": {flag: flag in flags for flag in WATCHED_FLAGS},
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "backends": rk.backends(),
        "max_bytes": max_bytes or ours.default_budget(device),
    }


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Leave a result as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
