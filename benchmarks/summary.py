"""One line for each table of several runs, with the file that it comes from: what a README can show and be held to.

python -m benchmarks.summary RUN.json [MORE.json ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import kind

Row = dict[str, Any]
BATCHES = {
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
}
HEAD = (
    "shape", "dtype", "batch", "ours, ms", "floor", "fastest peer", "ours / peer", "Liger", "error, ours", "peer",
    "file",
)  # fmt: skip


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    ms = 1e3 * row["median_s"]
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _off(own: Row, peer: Row | None) -> list[str]:
    """The same error of both, where both have one; else ours."""
    errors = [{} if row is None else row.get("errors", {}) for row in (own, peer)]
    names = ("logp_max", "kl_max", "advantages", "loss")
    name = next((n for n in names if n in errors[0] and (peer is None or n in errors[1])), None)
    return ["" if name not in found else f"{found[name]:.0e}" for found in errors]


def line(group: Sequence[Row], file: str) -> list[str] | None:
    """The cells of a table of one op; None where nobody of ours was right and timed."""
    timed = [row for row in group if "median_s" in row and str(row["verdict"]).startswith("ok")]
    ours = [row for row in timed if row["side"] == "ours" and "GiB" not in row["contender"]]
    if not ours:
        return None
    own = min(ours, key=lambda row: row["median_s"])
    named = {row["contender"]: row for row in timed}
    peer = named.get(own.get("fastest_peer", ""))
    floor = next((row for row in timed if row["side"] == "floor"), None)
    liger = [row for row in timed if row["contender"].startswith("Liger")]
    batch = BATCHES[own["op"]] + (f", {own['nats']:.2g} nats" if "nats" in own else "")
    fastest = "" if peer is None else f"{_ms(peer)} ({peer['contender']})"
    return [
        own.get("model") or own["shape"], own["dtype"], batch, f"**{_ms(own)}**", _ms(floor), fastest,
        f"**{own['to_peer']:.2f}**" if peer else "",
        _ms(min(liger, key=lambda row: row["median_s"])) if liger else "", *_off(own, peer), f"`{file}`",
    ]  # fmt: skip


def table(runs: Iterable[tuple[str, Sequence[Row]]]) -> str:
    """Markdown of (file's name, its rows)."""
    lines = [list(HEAD), ["---"] * len(HEAD)]
    for file, rows in runs:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(kind(row), []).append(row)
        lines += [cells for group in groups.values() if (cells := line(group, file))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    print(table((path.name, json.loads(path.read_text())["rows"]) for path in runs))


if __name__ == "__main__":
    main()
