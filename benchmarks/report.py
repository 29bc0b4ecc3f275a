"""What was measured, where, and the tables: JSON in, Markdown out.

python -m benchmarks.report RUN.json [MORE.json ...]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rlhf_kernels as rk
from benchmarks import ours

Row = dict[str, Any]
WATCHED_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "numpy", "trl", "liger-kernel", "verl", "transformers", "scipy", "triton")
TITLES = {
    "train": "forward and backward of a per-token weighted log-probability, no zero gradients",
    "score": "log-probability and entropy, no gradient",
    "grpo": "GRPO (token mean, clip 0.2), forward and backward",
    "dpo": "DPO with its reference scored in the step, forward and backward",
    "dpo_prompts": "the same, half the rows are prompt, which every contender is told",
    "sparse": "PPO, half the rows are prompt, 30 % of the others have zero advantage; peers are given the whole batch",
    "sparse_kept": "the same; peers are given the kept rows only",
    "gae": "advantages and returns",
}


def environment(threads: int, max_bytes: int | None) -> Row:
    """Where this was measured. No date: the same machine and versions should give the same file."""
    versions = {"python": platform.python_version(), "rlhf_kernels": rk.__version__}
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
    return {
        "versions": versions,
        "cpu": fields.get("model name", platform.processor()),
        "cpu_flags": {flag: flag in flags for flag in WATCHED_FLAGS},
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "backends": rk.backends(),
        "max_bytes": max_bytes or ours.default_budget(),
    }


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _milliseconds(row: Row) -> str:
    if "median_s" not in row:
        return ""
    middle, low, high = (1e3 * row[key] for key in ("median_s", "min_s", "max_s"))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _note(row: Row) -> str:
    notes = [] if row["verdict"] == "ok" else [row["verdict"]]
    if row.get("compiles") and "first_call_s" in row:
        notes.append(f"first call {row['first_call_s']:.1f} s")
    return "; ".join(notes)


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("contender", lambda r: f"**{r['contender']}**" if r["side"] == "ours" else r["contender"]),
    ("ms, median (min–max)", _milliseconds),
    ("× floor", lambda r: _number(r.get("to_floor"), ".2f")),
    ("× fastest peer", lambda r: _number(r.get("to_peer"), ".2f")),
    ("extra MB", lambda r: _number(None if "extra_bytes" not in r else r["extra_bytes"] / 1e6, ".0f")),
    ("logp max", lambda r: _number(r.get("errors", {}).get("logp_max"), ".0e")),
    ("logp mean", lambda r: _number(r.get("errors", {}).get("logp_mean"), ".0e")),
    ("entropy max", lambda r: _number(r.get("errors", {}).get("entropy_max"), ".0e")),
    ("loss", lambda r: _number(r.get("errors", {}).get("loss"), ".0e")),
    ("d hidden", lambda r: _number(r.get("errors", {}).get("grad_hidden"), ".0e")),
    ("d weight", lambda r: _number(r.get("errors", {}).get("grad_weight"), ".0e")),
    ("advantages", lambda r: _number(r.get("errors", {}).get("advantages"), ".0e")),
    ("", _note),
)


def markdown(rows: Iterable[Row]) -> str:
    """One table for each op, shape and dtype; columns that nobody fills are left out."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    tables = []
    for (op, shape, dtype), group in groups.items():
        cells = [[cell(row) for _, cell in COLUMNS] for row in group]
        used = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
        lines = [[COLUMNS[i][0] for i in used], ["---"] * len(used), *([line[i] for i in used] for line in cells)]
        share = group[0].get("zero_gradient_rows")
        zeros = f" {share:.0%} of the kept rows have zero gradient." if share else ""
        title = f"**{op}, {shape}, {dtype}**: {TITLES[op]}.{zeros}"
        tables.append(title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(tables)


def heading(environment: Row) -> str:
    flags = ", ".join(name for name, there in environment["cpu_flags"].items() if there) or "no vector flags known"
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    return (
        f"{environment['cpu']} ({flags}), {environment['threads']} threads, load {environment['load_before']} before; "
        f"{versions}; our backends {environment['backends']}, byte budget {environment['max_bytes'] / 2**20:.0f} MiB. "
        "Ratios are paired by round, below one is faster; errors are distances from float64 (gradients: relative L2)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = [json.loads(path.read_text()) for path in parser.parse_args().runs]
    for run in runs:
        print(heading(run["environment"]), end="\n\n")
        print(markdown(run["rows"]), end="\n\n")


if __name__ == "__main__":
    main()
