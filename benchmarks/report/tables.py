"""What was measured as tables and figures: JSON in, Markdown and SVG out.

python -m benchmarks report RUN.json [MORE.json ...]                        # every contender
python -m benchmarks report RUN.json [MORE.json ...] --summary              # a line for each of those tables
python -m benchmarks report RUN.json [MORE.json ...] --figures docs/bench   # the former, and docs/bench-*.svg
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.measure.turns import Row
from benchmarks.report import figures

BATCHES = {  # This is what tables call each op; it says which rows peers get where they do not get all.
    "train": "policy gradient, all rows",
    "score": "logp and entropy",
    "grpo": "GRPO",
    "grpo_groups": "GRPO, half prompt, half of the groups idle",
    "dpo": "DPO, no prompts",
    "dpo_prompts": "DPO, half prompt",
    "ipo": "IPO, half prompt",
    "kto": "KTO, half prompt",
    "orpo": "ORPO, half prompt",
    "sft": "cross-entropy, half prompt",
    "kl": "exact KL, half prompt",
    "logits": "statistics of ready logits",
    "sparse": "PPO, half prompt, 30 % idle; peers: whole batch",
    "sparse_kept": "PPO, half prompt, 30 % idle; peers: kept rows only",
    "gae": "advantages and returns",
    "memory": "policy gradient, all rows, peak memory",
}
SUMMARY = (
    "shape", "dtype", "batch", "ours, ms", "floor", "fastest peer", "ours / peer", "Liger", "error, ours", "peer",
    "file",
)  # fmt: skip


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each table, by what it is of."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kind = row["op"], row["shape"], row["dtype"], row.get("model"), row.get("text"), row.get("nats")
        found.setdefault(kind, []).append(row)
    return found


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _milliseconds(row: Row) -> str:
    return "{} ({}–{})".format(*(_ms(row[key]) for key in ("median_s", "min_s", "max_s"))) if "median_s" in row else ""


def _parts(row: Row) -> str:
    return " + ".join(_ms(row[key]) for key in ("forward_s", "backward_s")) if "forward_s" in row else ""


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


def markdown(rows: Iterable[Row]) -> str:
    """One table for each op, shape and dtype; columns that nobody fills are left out."""
    tables = []
    for (op, shape, dtype, model, source, nats), group in groups(rows).items():
        there = [row for row in group if not row["verdict"].startswith("skipped")]
        cells = [[cell(row) for _, cell in COLUMNS] for row in there]
        used = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
        share = group[0].get("zero_gradient_rows")
        zeros = f" {share:.0%} of the kept rows have zero gradient." if share else ""
        about = "".join(f", {x}" for x in (model, source, None if nats is None else f"{nats:.2g} nats") if x)
        title = f"**{op}, {shape}, {dtype}{about}**: {BATCHES[op]}.{zeros}"
        lines = [[line[i] for i in used] for line in cells]
        tables.append(f"{title}\n\n{grid([COLUMNS[i][0] for i in used], lines)}")
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


def _off(own: Row, peer: Row | None) -> list[str]:
    """The same error of both, where both have one; else ours."""
    errors = [{} if row is None else row.get("errors", {}) for row in (own, peer)]
    names = ("logp_max", "kl_max", "advantages", "loss")
    name = next((n for n in names if n in errors[0] and (peer is None or n in errors[1])), None)
    return ["" if name not in found else f"{found[name]:.0e}" for found in errors]


def _line(group: Sequence[Row], file: str) -> list[str] | None:
    """A table of one op as one line; None where nobody of ours was right and timed."""
    timed = [row for row in group if "median_s" in row and str(row["verdict"]).startswith("ok")]
    ours = [row for row in timed if row["side"] == "ours" and "GiB" not in row["contender"]]
    if not ours:
        return None
    own = min(ours, key=lambda row: row["median_s"])
    peer = {row["contender"]: row for row in timed}.get(own.get("fastest_peer", ""))
    floor = next((row for row in timed if row["side"] == "floor"), None)
    liger = [row["median_s"] for row in timed if row["contender"].startswith("Liger")]
    batch = BATCHES[own["op"]] + (f", {own['nats']:.2g} nats" if "nats" in own else "")
    return [
        own.get("model") or own["shape"], own["dtype"], batch, f"**{_ms(own['median_s'])}**",
        _ms(floor["median_s"]) if floor else "", f"{_ms(peer['median_s'])} ({peer['contender']})" if peer else "",
        f"**{own['to_peer']:.2f}**" if peer else "", _ms(min(liger)) if liger else "", *_off(own, peer), f"`{file}`",
    ]  # fmt: skip


def summary(runs: Iterable[tuple[str, Sequence[Row]]]) -> str:
    """One line for each table of (file's name, its rows): what a README can show and be held to."""
    lines = [_line(group, file) for file, rows in runs for group in groups(rows).values()]
    return grid(SUMMARY, filter(None, lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--summary", action="store_true", help="a line for each table, with the file that it is from")
    parser.add_argument("--figures", type=Path, help="how the names of figures begin, folder included")
    given = parser.parse_args(argv)
    runs = {path: json.loads(path.read_text()) for path in given.runs}
    if given.summary:
        print(summary((path.name, run["rows"]) for path, run in runs.items()))
        return
    for path, run in runs.items():
        print(f"`{path.name}`: {heading(run['environment'])}", end="\n\n")
        print(markdown(run["rows"]), end="\n\n")
    if given.figures:
        for name, drawn in figures.of([row for run in runs.values() for row in run["rows"]]).items():
            path = given.figures.with_name(f"{given.figures.name}-{name}.svg")
            path.write_text(drawn)
            print(path)
