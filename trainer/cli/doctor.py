"""`rlhf-train doctor`: what this machine has, what will be slow on it, and what to do about that."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.base.console import Parser, plain_table, say
from trainer.cli.machine import OPTIONAL, PACKAGE, Machine, examine
from trainer.inspect.screen import wrapped

LEAST_DISK, LEAST_MEMORY = 5.0, 4.0  # GB
NEEDED = ("transformers", "safetensors", "tyro", "yaml")


class Advice(NamedTuple):
    """What to do about something."""

    text: str
    blocking: bool = False
    """Whether training cannot start at all."""


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
    machine = examine(parser.parse_args(argv).out)
    found = list(advice(machine))
    say(screen(machine, found))
    return int(any(a.blocking for a in found))


def advice(m: Machine) -> Iterator[Advice]:
    """What to do, most pressing first."""
    if missing := ", ".join(PACKAGE.get(name, name) for name in NEEDED if not m.versions.get(name)):
        yield Advice(f'No stage can run without {missing}. Run: pip install "rlhf_kernels[train]"', blocking=True)
    if not m.versions.get("pyarrow"):
        yield Advice("Parquet files cannot be read. Run: pip install pyarrow, or convert them to jsonl.")
    if m.gpus and (why := m.backends.get("triton", "not there")) != "ok":
        yield Advice(f'The GPU runs on plain torch (triton: {why}). Run: pip install "rlhf_kernels[triton]"')
    if not m.gpus:
        if (why := m.backends.get("native", "not built")) != "ok":
            yield Advice(
                f"The C++ kernels do not run here ({why}), and losses use plain torch, which is several times slower. "
                "Install a C++ compiler, then this package again."
            )
        yield Advice(
            "There is no GPU. Models of a few million parameters train well here, larger ones need patience: begin "
            "with --model tiny."
        )
        if m.bfloat16 > 1.5:
            yield Advice(f"bfloat16 is {m.bfloat16:.1f} times faster than float32 here: use --precision bfloat16.")
        elif m.bfloat16 < 0.8:
            yield Advice(f"bfloat16 is {1 / m.bfloat16:.1f} times slower than float32 here: stay with float32.")
    granted = min(m.cores, m.quota or m.cores)
    if m.threads > granted + 0.5:
        few = max(1, int(granted))
        yield Advice(f"{m.threads} threads on {granted:g} granted processors wait for each other: use --threads {few}.")
    if m.load > 1.5 * m.cores:
        yield Advice(
            f"Other jobs are running (load {m.load:.1f} on {m.cores} processors), and threads wait for each other: use "
            "--threads 1 for small models."
        )
    if m.free_disk < LEAST_DISK:
        yield Advice(
            f"Only {m.free_disk:.1f} GB are left on the disk of {m.folder}, too little to save anything but small "
            "models: write to another one with --out."
        )
    if m.free_memory < LEAST_MEMORY:
        yield Advice(
            f"Only {m.free_memory:.1f} GB of memory are left: lower --max-tokens, which bounds memory and no more."
        )


def screen(m: Machine, found: Sequence[Advice]) -> str:
    """Tables and advice, no line longer than 80 columns."""
    lack = [(name, f"missing ({OPTIONAL[name]})") for name, version in m.versions.items() if not version]
    granted = f", {m.quota:g} granted" if m.quota is not None and m.quota < m.cores else ""
    tables = {
        "Software": [(name, version) for name, version in m.versions.items() if version] + lack,
        "Machine": [
            ("system", f"{platform.system()} {platform.machine()}"),
            ("processors", f"{m.cores}{granted}, load {m.load:.1f}"),
            ("threads of torch", str(m.threads)),
            ("memory", f"{m.free_memory:.1f} of {m.memory:.1f} GB free"),
            ("disk", f"{m.free_disk:.1f} GB free at {m.folder}"),
            ("GPU", ", ".join(m.gpus) or "none"),
        ],
        "Kernels": [(k, f"{state}, {m.isa}" if k == "native" and m.isa else state) for k, state in m.backends.items()],
    }
    parts = ["\n".join(line[:80] for line in plain_table(*table).split("\n")) for table in tables.items()]
    notes = [("MUST: " if a.blocking else "") + a.text for a in found] or ["Nothing to be done."]
    return "\n\n".join([*parts, "What to do\n" + "\n".join(wrapped(note, "  * ") for note in notes)])
