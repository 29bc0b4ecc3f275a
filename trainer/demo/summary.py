"""What the demo says at the end: tables, samples, verdicts, summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.base.statistics import Estimate, mean
from trainer.demo.measures import Judged
from trainer.run.log import RunLog
from trainer.stages.rl.watch import raised

SHOWN = 4
ALARM_WITHIN = 20  # updates


@dataclass(frozen=True)
class Arm:
    """A reward model and the policy trained on it."""

    accuracy: Estimate | None  # of the reward model, on held-out pairs as the judge orders them
    after: Judged
    scores_before: list[float]  # of the SFT model's responses, by this arm's reward model
    scores_after: list[float]


def measures(now: Judged, before: Judged | None = None) -> dict[str, Estimate]:
    """What the judge sees in one model, and the win rate where there is one to beat."""
    seen = {"judge": now.judge, "exact": now.exact, "clean": now.clean, "length": now.length}
    return seen | ({} if before is None else {"win_rate": now.against(before)})


def summarise(
    log: RunLog, before: Judged, arms: dict[str, Arm], seconds: dict[str, float], cpu_seconds: dict[str, float]
) -> dict[str, Any]:
    """Shows tables and samples, and writes ``summary.json``."""
    models = {"sft": measures(before)} | {name: measures(arm.after, before) for name, arm in arms.items()}
    rewards: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        rewards[name] = {
            "pair_accuracy": arm.accuracy,
            "score_before": mean(arm.scores_before),
            "score_after": mean(arm.scores_after),
        }
    accepted = acceptance(before, arms, raised(log.out_dir))
    for name, columns in (("Held-out, by the judge", models), ("Reward models", rewards)):
        rows = list(dict.fromkeys(row for column in columns.values() for row in column))
        cells = [(row.replace("_", " "), *(str(c.get(row, "")) for c in columns.values())) for row in rows]
        log.table(name, [("", *columns), *cells])
    for name, arm in arms.items():
        log.samples(f"SFT and {name}", _samples(before, arm))
    log.table("Acceptance", [(k.replace("_", " "), "yes" if ok else "NO") for k, ok in accepted.items()])
    summary = {
        "verdicts": _verdicts(before, arms, accepted),
        "models": models,
        "rewards": rewards,
        "acceptance": accepted,
        "time": {"seconds": _with_total(seconds), "cpu_seconds": _with_total(cpu_seconds)},
    }
    summary = _plain(summary)
    log.summary(summary)
    return summary


def acceptance(before: Judged, arms: dict[str, Arm], alarms: Sequence[Mapping[str, Any]] = ()) -> dict[str, bool]:
    """What this demo promises at its full length."""
    main, accuracy = arms["ppo"], arms["ppo"].accuracy
    promised = {
        "sft_exact": before.exact.value >= 0.45,
        "reward_accuracy": accuracy is not None and accuracy.value >= 0.85,
        "ppo_win_rate": main.after.against(before).low > 0.70,
        "ppo_exact": main.after.exact.value >= before.exact.value + 0.15,
        "ppo_no_alarm": all(alarm["stage"] != "ppo" for alarm in alarms),
    }
    if "hack" in arms:
        hack = arms["hack"]
        promised["hack_reward_rises"] = mean(hack.scores_before).high < mean(hack.scores_after).low
        promised["hack_judge_falls"] = hack.after.judge.high < before.judge.low
        promised["hack_alarm"] = any(alarm["stage"] == "hack" and alarm["step"] <= ALARM_WITHIN for alarm in alarms)
    return promised


def _with_total(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(s, 1) for name, s in seconds.items()} | {"total": round(sum(seconds.values()), 1)}


def _samples(before: Judged, arm: Arm) -> list[dict[str, Any]]:
    rows = range(min(SHOWN, len(before.prompts)))
    return [
        {
            "prompt": before.prompts[i],
            "before": before.responses[i],
            "after": arm.after.responses[i],
            "judge": f"{before.scores[i]:.2f} -> {arm.after.scores[i]:.2f}",
            "reward model": f"{arm.scores_before[i]:.2f} -> {arm.scores_after[i]:.2f}",
        }
        for i in rows
    ]


def _verdicts(before: Judged, arms: dict[str, Arm], accepted: dict[str, bool]) -> list[dict[str, Any]]:
    main = arms["ppo"].after
    verdicts = [
        {
            "title": "PPO learnt what was wanted",
            "text": f"Wins {main.against(before)} of held-out prompts against the SFT model; "
            f"exact order {before.exact.value:.2f} before, {main.exact.value:.2f} after.",
            "ok": accepted["ppo_win_rate"],
        }
    ]
    if "hack" in arms:
        hack = arms["hack"]
        shown = accepted["hack_reward_rises"] and accepted["hack_judge_falls"]
        verdicts.append(
            {
                "title": "Reward hacking, as it looks" if shown else "No reward hacking in this run",
                "text": "A reward model from a few rankings, and no KL penalty: its score went from "
                f"{mean(hack.scores_before)} to {mean(hack.scores_after)}, the judge's from {before.judge} to "
                f"{hack.after.judge}.",
                "ok": shown,
            }
        )
    return verdicts


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_dict()
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
