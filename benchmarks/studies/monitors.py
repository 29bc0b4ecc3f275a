"""Calibrates the monitors on the demo: records runs, replays them, draws docs/monitors-*.svg.

    python -m benchmarks monitors record runs/study 0 1 2 3 4     # about two minutes a seed on one core
    python -m benchmarks monitors record runs/study 0 --arms long rescue
    python -m benchmarks monitors pack runs/study runs/study/all.jsonl
    python -m benchmarks monitors table runs/study/all.jsonl
    python -m benchmarks monitors pack runs/study tests/data/monitor_series.jsonl --arms ppo hack --seeds 0 1 2 3 4
    python -m benchmarks monitors plots tests/data/monitor_series.jsonl docs

Arms: ``ppo`` and ``hack`` are the demo's own. ``long`` is the healthy arm over 120 updates. ``rescue`` is the weak
reward model of ``hack`` with kl_coef=0.2, which keeps the policy from gaming it. ``leashed`` is ``hack`` with
``on_alarm="raise_kl"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.report.tables import grid
from trainer.monitors.history import Thresholds
from trainer.monitors.measures import Signals, of_log
from trainer.monitors.monitor import Alarm, Monitor
from trainer.report.plots import Line, drawing

EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "long": ("reward", {"steps": 120, "kl_coef": 0.1}),
    "rescue": ("weak_reward", {"steps": 60, "kl_coef": 0.2}),
    "leashed": ("weak_reward", {"steps": 60, "kl_coef": 0.0, "on_alarm": "raise_kl"}),
}
DIGITS = 5
Series = dict[str, list[float | None]]


def record(out: Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Runs the demo, or more arms on the models of a demo that was run before."""
    from trainer.demo.stage import Demo, DemoConfig
    from trainer.demo.stage import demo as run_demo
    from trainer.models.loading import load_policy

    for seed in seeds:
        cfg = DemoConfig(out=out / f"seed{seed}", seed=seed)
        if not (cfg.out / "summary.json").exists():
            run_demo(cfg)
        demo = Demo(cfg)
        before = demo.judged(load_policy(str(cfg.out / "sft"))) if arms else None
        for arm in arms:
            rewarding, options = EXTRA[arm]
            assert before is not None
            demo.ppo(arm, rewarding, before, **options)


def pack(runs: Path, path: Path, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> None:
    """Signals of the policy runs in these run folders, a line per arm and seed; None takes them all."""
    lines = []
    for metrics in sorted(runs.glob("seed*/metrics.jsonl")):
        logged: dict[str, list[dict[str, Any]]] = {}
        for line in metrics.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "objective/kl" in row:
                logged.setdefault(row["stage"], []).append(row)
        seed = int(metrics.parent.name.removeprefix("seed"))
        for arm, rows in logged.items():
            if (arms is None or arm in arms) and (seeds is None or seed in seeds):
                lines.append({"seed": seed, "arm": arm, "signals": _columns(map(of_log, rows))})
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _columns(rows: Iterable[Signals]) -> Series:
    rows = list(rows)
    names = sorted({name for row in rows for name in row} - {"length_slope", "distinct_2"})
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of ``pack``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(series: Series) -> list[Signals]:
    """Signals per update."""
    count = len(next(iter(series.values())))
    return [{name: x for name, column in series.items() if (x := column[i]) is not None} for i in range(count)]


def replay(series: Series, thresholds: Thresholds | None = None) -> list[Alarm]:
    """The alarms of a recorded run."""
    monitor = Monitor(thresholds)
    return [alarm for step, row in enumerate(rows_of(series), start=1) for alarm in monitor.observe(step, row)]


def table(path: Path) -> str:
    """Alarms per run, and how near healthy runs come to each threshold."""
    lines, runs = [], read(path)
    for run in runs:
        told = ", ".join(f"{a.name} {a.since}, {a.step}" for a in replay(run["signals"])) or "none"
        lines.append((run["arm"], str(run["seed"]), str(len(run["signals"]["kl"])), told))
    return grid(("arm", "seed", "updates", "alarms: rule, since update, raised at"), lines) + "\n\n" + _margins(runs)


def _margins(runs: Sequence[dict[str, Any]]) -> str:
    """The furthest that each smoothed signal goes, by arm."""
    arms = sorted({run["arm"] for run in runs})
    lines = []
    extremes = {arm: [_extremes(run["signals"]) for run in runs if run["arm"] == arm] for arm in arms}
    for name in next(iter(extremes.values()))[0]:
        cells = [f"{min(e[name] for e in own):.2f} to {max(e[name] for e in own):.2f}" for own in extremes.values()]
        lines.append((name, *cells))
    return grid(("signal", *arms), lines)


def _extremes(series: Series) -> dict[str, float]:
    """Worst value of each signal over a run; the range over seeds is what the table shows."""
    t = Thresholds()

    def smooth(name: str) -> list[float]:
        x = [v for v in series[name] if v is not None]
        return [math.fsum(x[max(0, i - t.window) : i]) / min(i, t.window) for i in range(1, len(x) + 1)]

    def relative(name: str) -> list[float]:
        return [x / (series[name][0] or math.nan) for x in smooth(name)]

    gold, span = smooth("gold"), 2 * t.window
    best = [max(gold[t.window - 1 : i + 1]) for i in range(t.window - 1, len(gold))]
    drop = max(b - g for b, g in zip(best, gold[t.window - 1 :], strict=True)) / (series["gold_std"][0] or math.nan)
    kl = smooth("kl")
    return {
        "largest KL": max(kl),
        f"largest growth in {span} updates": max((b - a for a, b in zip(kl, kl[span:], strict=False)), default=0.0),
        "largest fall of the gold score (first deviations)": drop,
        "smallest entropy / first": min(relative("entropy")),
        "smallest length / first": min(relative("length")),
        "largest length / first": max(relative("length")),
        "largest correlation with length": max(smooth("length_corr")),
        "smallest share of different answers / first": min(relative("distinct")),
        "smallest number of forms / first": min(relative("forms")),
        "largest share cut off": max(smooth("truncated")),
    }


def plots(path: Path, out: Path) -> None:
    """One drawing per signal; the hacking arm of every seed beside the healthy one, alarms as dots."""
    runs = [run for run in read(path) if run["arm"] in ("ppo", "hack")]
    t = Thresholds()
    out.mkdir(parents=True, exist_ok=True)
    for name, title, guide in (
        ("proxy", "Reward", None), ("gold", "Gold score", None), ("kl", "KL, nats per response", t.kl_per_seq),
        ("length_corr", "Correlation of reward and length", t.length_corr), ("forms", "Answer forms", None),
    ):  # fmt: skip
        lines = [
            Line(f"{run['arm']} {run['seed']}", int(run["arm"] == "hack"), *_curve(run["signals"][name]))
            for run in runs
        ]
        marks = []
        for run in runs:
            for alarm in replay(run["signals"]):
                if alarm.name == {"gold": "proxy_gold", "proxy": "proxy_gold"}.get(name, name):
                    marks.append((alarm.step, run["signals"][name][alarm.step - 1], str(alarm.name)))
        (out / f"monitors-{name.replace('_', '-')}.svg").write_text(
            drawing(title, lines, guide, marks), encoding="utf-8"
        )


def _curve(values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    known = [(float(i), v) for i, v in enumerate(values, start=1) if v is not None]
    return [x for x, _ in known], [y for _, y in known]


def main(argv: Sequence[str] | None = None) -> None:
    """One of the jobs above."""
    parser = command.parser("monitors", __doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    recording = jobs.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("seeds", type=int, nargs="+")
    recording.add_argument("--arms", nargs="*", default=[], choices=EXTRA)
    packing, drawn = jobs.add_parser("pack"), jobs.add_parser("plots")
    for job in (packing, drawn):
        job.add_argument("source", type=Path)
        job.add_argument("out", type=Path)
    packing.add_argument("--arms", nargs="*")
    packing.add_argument("--seeds", type=int, nargs="*")
    jobs.add_parser("table").add_argument("source", type=Path)
    options = parser.parse_args(argv)
    if options.job == "record":
        record(options.out, options.seeds, options.arms)
    elif options.job == "table":
        print(table(options.source))
    elif options.job == "pack":
        pack(options.source, options.out, options.arms, options.seeds)
    else:
        plots(options.source, options.out)
