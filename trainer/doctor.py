"""`rlhf-train doctor`: what this machine has, what will be slow on it, and what to do about that."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from trainer.console import Parser, plain_table, say
from trainer.inspect_text import wrapped

GB = 1e9
LEAST_DISK, LEAST_MEMORY = 5.0, 4.0  # GB
OPTIONAL = {
    "transformers": "every stage", "safetensors": "every stage", "tyro": "the command line", "yaml": "recipes",
    "rich": "moving progress bars", "pyarrow": "parquet files", "tensorboard": "curves in tensorboard",
    "triton": "GPU kernels", "flash_attn": "fast packed attention on GPUs",
}  # fmt: skip
NEEDED = ("transformers", "safetensors", "tyro", "yaml")
PACKAGE = {"yaml": "pyyaml", "flash_attn": "flash-attn"}  # where pip knows it under another name


class Advice(NamedTuple):
    """What to do about something."""

    text: str
    blocking: bool = False
    """Whether training cannot start at all."""


class Machine(NamedTuple):
    """What was found. Sizes are GB, times are milliseconds."""

    versions: dict[str, str]
    """Of Python, torch, rlhf_kernels and the optional packages; empty where one is missing."""
    backends: dict[str, str]
    """As ``rk.backends()``: "ok", or why not."""
    gpus: list[str]
    cores: int
    """Logical processors that this process may use."""
    quota: float | None
    """Processors that the control group grants, where it sets a limit."""
    load: float
    """Load average of the last minute."""
    threads: int
    """That torch uses."""
    spin: str
    """GOMP_SPINCOUNT or OMP_WAIT_POLICY, as the environment of the caller had it."""
    memory: float
    free_memory: float
    free_disk: float
    folder: str
    """Whose disk was asked."""
    matmul: dict[str, float]
    """Billion operations per second of a product of matrices, by dtype."""
    region: tuple[float, float]
    """Time of a small parallel region with one thread, and with all of them."""
    isa: str = ""
    """The instruction set of the C++ kernels; empty where they do not run."""


def main(argv: Sequence[str], prog: str = "rlhf-train doctor") -> int:
    """Prints what the machine has.

    Args:
        argv: Arguments after the subcommand.
        prog: For the usage line.

    Returns:
        0, or 1 if training cannot start here.
    """
    parser = Parser(prog=prog, description="What this machine has, and what will be slow on it.")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs will be written (default: runs)")
    options = parser.parse_args(argv)
    from trainer.doctor_probe import examine

    machine = examine(options.out)
    found = advice(machine)
    say(screen(machine, found))
    return int(any(a.blocking for a in found))


def installed() -> dict[str, str]:
    """Versions of the optional packages; empty where one is missing."""
    return {name: _version(PACKAGE.get(name, name)) if util.find_spec(name) else "" for name in OPTIONAL}


def free_disk(folder: Path) -> float:
    """GB free where ``folder`` is or would be."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free / GB


def advice(machine: Machine) -> list[Advice]:
    """What to do, most pressing first."""
    found = [*_packages(machine), *_kernels(machine), *_processors(machine), *_room(machine)]
    return sorted(found, key=lambda a: not a.blocking)


def _packages(m: Machine) -> list[Advice]:
    missing = [name for name in NEEDED if not m.versions.get(name)]
    found = []
    if missing:
        names = ", ".join(PACKAGE.get(name, name) for name in missing)
        found.append(Advice(f'{names} missing: pip install "rlhf_kernels[train]"', blocking=True))
    for name in ("pyarrow",):
        if not m.versions.get(name):
            found.append(Advice(f"Parquet files cannot be read: pip install {name}, or convert them to jsonl."))
    return found


def _kernels(m: Machine) -> list[Advice]:
    if m.gpus and m.backends.get("triton") != "ok":
        return [Advice(f"The GPU runs on plain torch ({m.backends.get('triton', 'no triton backend')}).")]
    if not m.gpus and m.backends.get("native") != "ok":
        why = m.backends.get("native", "not built")
        return [Advice(f"The C++ kernels do not run here ({why}): losses use plain torch, several times slower.")]
    return []


def _processors(m: Machine) -> list[Advice]:
    found = []
    if not m.gpus:
        found.append(
            Advice(
                "No GPU: models of a few million parameters train well here, larger ones need patience. --model tiny."
            )
        )
    granted = min(m.cores, m.quota or m.cores)
    if m.threads > granted + 0.5:
        few = max(1, int(granted))
        found.append(
            Advice(f"{m.threads} threads on {granted:g} granted processors wait for each other: --threads {few}")
        )
    one, every = m.region
    if m.threads > 1 and every > 3 * one and every > 0.05:
        found.append(
            Advice(
                f"Starting {m.threads} threads costs {every:.2f} ms here, against {one:.2f} ms of work for one: other "
                "jobs hold the processors, and OpenMP spins while it waits. Use --threads 1 for small models; "
                "rlhf-train cuts the spinning short by itself, other programs want GOMP_SPINCOUNT=1000."
            )
        )
    elif m.load > 1.5 * granted:
        found.append(Advice(f"Other jobs are running (load {m.load:.1f} on {granted:g} processors): --threads 1."))
    full, half = m.matmul.get("float32", 0.0), m.matmul.get("bfloat16", 0.0)
    if full and half and not m.gpus:
        if half < 0.8 * full:
            found.append(Advice(f"bfloat16 is {full / half:.1f} times slower than float32 here: --precision float32."))
        elif half > 1.5 * full:
            found.append(Advice(f"bfloat16 is {half / full:.1f} times faster than float32 here: --precision bfloat16."))
    return found


def _room(m: Machine) -> list[Advice]:
    found = []
    if m.free_disk < LEAST_DISK:
        found.append(
            Advice(
                f"{m.free_disk:.1f} GB left on the disk of {m.folder}: too little to save anything but small models."
            )
        )
    if m.free_memory < LEAST_MEMORY:
        found.append(Advice(f"{m.free_memory:.1f} GB of memory left: lower --max-tokens, it bounds memory only."))
    return found


def screen(m: Machine, found: Sequence[Advice]) -> str:
    """Tables and advice, no line longer than 80 columns."""
    have = [(name, version) for name, version in m.versions.items() if version]
    lack = [(name, f"missing ({OPTIONAL[name]})") for name, version in m.versions.items() if not version]
    granted = f", {m.quota:g} granted" if m.quota is not None and m.quota < m.cores else ""
    machine = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("processors", f"{m.cores}{granted}, load {m.load:.1f}"),
        ("threads of torch", f"{m.threads}, spinning: {m.spin}"),
        ("memory", f"{m.free_memory:.1f} of {m.memory:.1f} GB free"),
        ("disk", f"{m.free_disk:.1f} GB free at {m.folder}"),
        ("GPU", ", ".join(m.gpus) or "none"),
        *((f"product in {dtype}", f"{speed:.0f} Gflop/s") for dtype, speed in m.matmul.items()),
    ]  # fmt: skip
    kernels = [
        (name, f"{state}, {m.isa}" if name == "native" and m.isa else state) for name, state in m.backends.items()
    ]
    tables = [("Software", have + lack), ("Machine", machine), ("Kernels", kernels)]
    parts = ["\n".join(line[:80] for line in plain_table(*table).split("\n")) for table in tables]
    notes = [("MUST: " if a.blocking else "") + a.text for a in found] or ["Nothing to be done."]
    return "\n\n".join([*parts, "What to do\n" + "\n".join(wrapped(note, "  * ") for note in notes)])


def python_version() -> str:
    """Of this interpreter."""
    return ".".join(map(str, sys.version_info[:3]))


def cores() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"
