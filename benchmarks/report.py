"""What was measured, where, and the tables: JSON in, Markdown and figures out.

python -m benchmarks.report RUN.json [MORE.json ...]                        # tables
python -m benchmarks.report RUN.json [MORE.json ...] --figures docs/bench   # and docs/bench-*.svg
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import rlhf_kernels as rk
from benchmarks import figures, ours
from benchmarks.peers.loading import see_folders

Row = dict[str, Any]
WATCHED_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")
PACKAGES = (
    "torch", "numpy", "trl", "liger-kernel", "verl", "transformers", "scipy", "triton", "quack-kernels",
    "cut-cross-entropy", "fla-core",
)  # fmt: skip
ROOT = Path(__file__).parents[1]
TITLES = {
    "train": "forward and backward of a per-token weighted log-probability, no zero gradients",
    "score": "log-probability and entropy, no gradient",
    "grpo": "GRPO (token mean, clip 0.2), forward and backward",
    "dpo": "DPO with its reference scored in the step, forward and backward",
    "dpo_prompts": "the same, half the rows are prompt, which every contender is told",
    "grpo_groups": "GRPO, half the rows are prompt, every second group has no advantage; peers: kept rows only",
    "ipo": "IPO (means per reply), half prompt, its reference scored in the step; peers: kept rows only",
    "kto": "KTO, half prompt, its reference scored in the step; peers: kept rows only",
    "orpo": "ORPO, half prompt; peers: kept rows only",
    "sft": "cross-entropy, half prompt, forward and backward; peers: kept rows only",
    "kl": "mean exact KL(policy | reference) over the vocabulary, half prompt, forward and backward",
    "logits": "the statistics of logits that are there already, and the gradient by them",
    "sparse": "PPO, half the rows are prompt, 30 % of the others have zero advantage; peers are given the whole batch",
    "sparse_kept": "the same; peers are given the kept rows only",
    "gae": "advantages and returns",
}


def commit() -> str | None:
    """Of the checkout, with a plus where the library or the benchmark differ from it."""
    if not (ROOT / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(ROOT)]
        found = subprocess.run([*ask, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["rlhf_kernels", "csrc", "benchmarks/*.py"]
        changed = subprocess.run([*ask, "diff", "--quiet", "HEAD", "--", *paths], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.returncode else "")


def instruction_set() -> str | None:
    """That of the native backend, which a machine's flags or RLHF_KERNELS_ISA decide; None without the extension."""
    return importlib.import_module("rlhf_kernels._C").isa() if rk.backends()["native"] == "ok" else None


def environment(threads: int, max_bytes: int | None, device: str = "cpu") -> Row:
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


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _milliseconds(row: Row) -> str:
    if "median_s" not in row:
        return ""
    middle, low, high = (1e3 * row[key] for key in ("median_s", "min_s", "max_s"))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _parts(row: Row) -> str:
    if "forward_s" not in row:
        return ""
    return " + ".join(f"{1e3 * row[key]:.3g}" for key in ("forward_s", "backward_s"))


def _error(*names: str) -> Any:
    """Of a row, to one digit each."""

    def cell(row: Row) -> str:
        found = [row.get("errors", {}).get(name) for name in names]
        return " / ".join(format(x, ".0e") for x in found if x is not None)

    return cell


def _note(row: Row) -> str:
    notes = [] if row["verdict"] == "ok" else [row["verdict"]]
    if row.get("compiles") and "first_call_s" in row:
        notes.append(f"first call {row['first_call_s']:.1f} s")
    return "; ".join(notes)


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("contender", lambda r: f"**{r['contender']}**" if r["side"] == "ours" else r["contender"]),
    ("ms, median (min–max)", _milliseconds),
    ("forward + backward", _parts),
    ("share of floor", lambda r: _number(None if not r.get("to_floor") else 1 / r["to_floor"], ".0%")),
    ("× floor", lambda r: _number(r.get("to_floor"), ".2f")),
    ("× fastest peer", lambda r: _number(r.get("to_peer"), ".2f")),
    ("extra MB", lambda r: _number(None if "extra_bytes" not in r else r["extra_bytes"] / 1e6, ".0f")),
    ("launches", lambda r: _number(r.get("launches"), "d")),
    ("host waits", lambda r: _number(r.get("host_syncs"), "d")),
    ("logp max / mean", _error("logp_max", "logp_mean")),
    ("entropy max / mean", _error("entropy_max", "entropy_mean")),
    ("KL max / mean", _error("kl_max", "kl_mean")),
    ("loss", _error("loss")),
    ("d hidden", _error("grad_hidden", "grad_hidden_max")),
    ("d weight", _error("grad_weight", "grad_weight_max")),
    ("d logits", _error("grad_logits", "grad_logits_max")),
    ("advantages", _error("advantages")),
    ("", _note),
)


def kind(row: Row) -> tuple[Any, ...]:
    """What its table is of."""
    return row["op"], row["shape"], row["dtype"], row.get("model"), row.get("text"), row.get("nats")


def markdown(rows: Iterable[Row]) -> str:
    """One table for each op, shape and dtype; columns that nobody fills are left out."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(kind(row), []).append(row)
    tables = []
    for (op, shape, dtype, model, source, nats), group in groups.items():
        there = [row for row in group if not row["verdict"].startswith("skipped")]
        cells = [[cell(row) for _, cell in COLUMNS] for row in there]
        used = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
        lines = [[COLUMNS[i][0] for i in used], ["---"] * len(used), *([line[i] for i in used] for line in cells)]
        share = group[0].get("zero_gradient_rows")
        zeros = f" {share:.0%} of the kept rows have zero gradient." if share else ""
        about = "".join(f", {x}" for x in (model, source, None if nats is None else f"{nats:.2g} nats") if x)
        title = f"**{op}, {shape}, {dtype}{about}**: {TITLES[op]}.{zeros}"
        tables.append(title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
        absent = [
            f"{row['contender']} ({row['verdict'].removeprefix('skipped: ')})" for row in group if row not in there
        ]
        if absent:
            tables.append("Not here: " + "; ".join(absent) + ".")
    return "\n\n".join(tables)


def heading(environment: Row) -> str:
    cpu = ", ".join(filter(None, (environment["cpu"], environment.get("cpu_model"))))  # Older files lack the second.
    flags = ", ".join(name for name, there in environment["cpu_flags"].items() if there) or "no vector flags known"
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    device = environment.get("device", "cpu")
    where = ("" if device == "cpu" else f"{device}; ") + f"{cpu} ({flags})"
    return (
        f"{where}, {environment['threads']} threads, load {environment['load_before']} before; "
        f"commit {environment.get('commit') or 'unknown'}; {versions}; our backends {environment['backends']}, "
        f"native on {environment.get('isa') or 'unknown'}, byte budget {environment['max_bytes'] / 2**20:.0f} MiB. "
        "Ratios are paired by round, below one is faster; errors "
        "are distances from float64 (gradients: relative L2 / largest over largest)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--figures", type=Path, help="how the names of figures begin, folder included")
    given = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in given.runs]
    for path, run in zip(given.runs, runs, strict=True):
        print(f"`{path.name}`: {heading(run['environment'])}", end="\n\n")
        print(markdown(run["rows"]), end="\n\n")
    if given.figures:
        for name, drawn in figures.of([row for run in runs for row in run["rows"]]).items():
            path = given.figures.with_name(f"{given.figures.name}-{name}.svg")
            path.write_text(drawn)
            print(path)


if __name__ == "__main__":
    main()
