"""Do models learn the same with a tolerance? The demo's SFT, PPO and DPO, with it and without, seed by seed.

python -m benchmarks learning runs/tolerance --seeds 0 1 2 3 4 --out FILE     # two minutes a seed on one core
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import command
from benchmarks.report.environment import environment, write
from benchmarks.report.tables import grid
from trainer.demo import task as demo_task
from trainer.demo.stage import NOISE, Demo, DemoConfig
from trainer.evaluation.win_rate import win_rate
from trainer.models.policy import Policy
from trainer.stages.preference.dpo import DPOConfig, dpo

TOLERANCE = 0.0002
MEASURES = ("sft_exact", "sft_judge", "ppo_judge", "ppo_win_rate", "dpo_judge", "dpo_win_rate")


@contextmanager
def tolerating(tolerance: float | None) -> Iterator[None]:
    """Every loss of the trainer gets the option."""
    plain = Policy.head
    Policy.head = property(lambda self: plain.fget(self) | {"tolerance": tolerance})  # type: ignore[method-assign,misc]
    try:
        yield
    finally:
        Policy.head = plain  # type: ignore[method-assign]


def arm(out: Path, seed: int) -> dict[str, float]:
    demo = Demo(DemoConfig(out=out, seed=seed, quiet=True))
    policy = demo.sft()
    before = demo.judged(policy)
    asked = demo_task.prompts(demo.cfg.ranked_prompts, demo.source, held_out=False)
    demo.file("prompts.jsonl", ({"prompt": p} for p in asked))
    ranked = demo.file("ranked.jsonl", demo.ranked(policy, asked, NOISE))
    held_out = demo.file("held_out.jsonl", demo.ranked(policy, demo.test[: demo.cfg.test_prompts // 2], 0.0))
    demo.reward("reward", ranked, held_out, demo.cfg.reward_steps)
    after = {"ppo": demo.ppo("ppo", "reward", before, steps=demo.cfg.ppo_steps, kl_coef=0.1)}
    after["dpo"] = dpo(
        DPOConfig(model=str(out / "sft"), data=ranked, out=out / "dpo", seed=seed, steps=60, lr=5e-5, beta=1.0),
        demo.log,
    )
    scores = [v.score for v in before.verdicts]
    found = {
        "sft_exact": statistics.mean(float(v.exact) for v in before.verdicts),
        "sft_judge": statistics.mean(scores),
    }
    for name, trained in after.items():
        now = [v.score for v in demo.judged(trained).verdicts]
        found |= {f"{name}_judge": statistics.mean(now), f"{name}_win_rate": win_rate(now, scores).value}
    return found


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with their standard errors, and of the paired differences."""
    lines = []
    for name in MEASURES:
        exact, near = ([run[kind][name] for run in runs] for kind in ("exact", "tolerance"))
        cells = []
        for values in (exact, near, [b - a for a, b in zip(exact, near, strict=True)]):
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}")
        lines.append((name, *cells))
    return grid(("", "exact", "tolerance", "difference"), lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser("learning", __doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    for seed in args.seeds:
        run: dict[str, Any] = {"seed": seed}
        for kind, tolerance in (("exact", None), ("tolerance", TOLERANCE)):
            with tolerating(tolerance):
                run[kind] = arm(args.runs / f"{kind}{seed}", seed)
        found.append(run)
        print(json.dumps(run), flush=True)
        write(args.out, {"environment": environment(1), "tolerance": TOLERANCE, "runs": found})
    print(summary(found))
