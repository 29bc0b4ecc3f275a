"""The monitor in a training loop: what it is shown, what it writes down, and what an alarm does to the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.chat import render_of
from trainer.evaluation.alignment_tax import held_out_texts, losses, per_token
from trainer.models.policy import Policy
from trainer.models.rendering import render_as
from trainer.monitors.history import thresholds_from
from trainer.monitors.measures import Samples
from trainer.monitors.monitor import Alarm, Monitor
from trainer.monitors.probes import Probes, read_probes, sycophancy
from trainer.rewards.sources import Reward, responses_of, reward_from
from trainer.run.folder import ALARMS
from trainer.run.log import RunLog
from trainer.run.records import records
from trainer.stages.rl.experience import Collected
from trainer.stages.rl.kl_controller import KLController

if TYPE_CHECKING:
    from trainer.stages.rl.options import RLConfig

RAISE, LEAST = 2.0, 0.05  # of the KL coefficient


class Watch:
    """Everything around a monitor that is not its state.

    Args:
        cfg: Names the gold reward, the probes, the held-out text, and what an alarm does.
        tokenizer: Of the policy.
        device: Where a gold reward model goes.
    """

    def __init__(self, cfg: RLConfig, tokenizer: Any, device: torch.device) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.probes = read_probes(cfg.probes) if cfg.probes else Probes()
        self.texts = held_out_texts(cfg.tax_data, tokenizer, cfg.max_length, render_as(cfg)) if cfg.tax_data else []
        self.gold: Reward | None = None
        if cfg.gold_reward:
            self.gold = reward_from(
                cfg.gold_reward, tokenizer, max_length=cfg.max_length, max_tokens=cfg.max_tokens, device=device
            )
        self.stopped_by: Alarm | None = None

    def monitor(self) -> Monitor:
        """A new one; it belongs into the state of the run."""
        return Monitor(thresholds_from(self.cfg.thresholds), self.probes.patterns)

    def see(self, monitor: Monitor, found: Collected, records: Sequence[dict[str, Any]]) -> None:
        """Shows a rollout to a monitor, with what the gold reward says about it, where there is one.

        Args:
            monitor: Of this run.
            found: The rollout.
            records: Of its prompts.
        """
        rollout = found.rollout
        gold = None if self.gold is None else self.gold(rollout, records).tolist()
        lengths = [len(rollout.response(i)) for i in range(len(records))]
        prompts, responses = [r["prompt"] for r in records], responses_of(rollout, self.tokenizer)
        monitor.see(Samples(prompts, responses, lengths, found.scores.tolist(), gold))

    def evaluate(self, policy: Policy) -> dict[str, float]:
        """Held-out loss and sycophancy, where the configuration names files for them."""
        found = {"eval/lm_loss": per_token(losses(policy, self.texts, self.cfg.max_tokens))} if self.texts else {}
        limits = {"max_new_tokens": self.cfg.max_new_tokens, "max_length": self.cfg.max_length}
        asked = render_of(self.tokenizer, self.cfg.prompt_format, self.cfg.template_date).text
        return found | sycophancy(policy, self.probes, asked=asked, **limits)

    def update(
        self, step: int, metrics: Mapping[str, float], monitor: Monitor, control: KLController, log: RunLog, stage: str
    ) -> dict[str, float]:
        """Shows an update to the monitor, writes alarms down and acts on them.

        Args:
            step: Counted from 1.
            metrics: Of the update and of the evaluation after it, if there was one.
            monitor: Of this run.
            control: Its coefficient is doubled where alarms shall raise it, and becomes 0.05 where it was less.
            log: Gets a line per alarm on the screen, and one in alarms.jsonl.
            stage: Named in both.

        Returns:
            What to log beside the metrics. ``stopped_by`` is set where the run shall stop.
        """
        alarms = monitor.update(step, metrics)
        say = log.warn if log.console.quiet else log.note  # who wants no progress bar still wants to be woken
        for alarm in alarms:
            say(f"ALARM in {stage}: {alarm}")
            write(log.out_dir, stage, alarm)
        if alarms and self.cfg.on_alarm == "raise_kl":
            control.coef = max(RAISE * control.coef, LEAST)
            say(f"The KL coefficient is now {control.coef:.3g}.")
        if alarms and self.cfg.on_alarm == "stop":
            self.stopped_by = alarms[0]
            say(f"Stopped at update {step}, as on_alarm=stop asks; the policy is saved as it is.")
        return monitor.metrics() | {"monitor/alarms": float(len(monitor.alarms))}


def raised(out_dir: Path) -> list[dict[str, Any]]:
    """The lines of alarms.jsonl: a stage, and the fields of an ``Alarm``; none without the file."""
    return records(out_dir / ALARMS)


def write(out_dir: Path, stage: str, alarm: Alarm) -> None:
    """Adds a line to alarms.jsonl."""
    with (out_dir / ALARMS).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps({"stage": stage, **asdict(alarm)}, ensure_ascii=False) + "\n")
