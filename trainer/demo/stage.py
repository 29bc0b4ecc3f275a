"""The main job in one command: SFT, reward model and PPO from scratch, and what happens without a leash.

The stages are those of ``sft``, ``reward`` and ``ppo``; only the data comes from an embedded task.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.base.config import plain
from trainer.base.typed_options import check_types, settle
from trainer.demo import task as demo_task
from trainer.demo.measures import MAX_NEW_TOKENS, Judged, judged
from trainer.demo.summary import Arm, measures, summarise
from trainer.models.policy import Policy
from trainer.models.tiny import tiny_policy, word_tokenizer
from trainer.run import sinks
from trainer.run.folder import refuse_links, refuse_others
from trainer.run.mark import mark, opened
from trainer.stages import reward_model, sft
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.ppo import PPOConfig

K = 4  # responses per ranked prompt
NOISE = 0.5  # of the annotators, in units of the judge's score
SFT_BATCH = 64
FOLDERS = ("base", "data", "sft", "reward", "ppo", "weak_reward", "hack")  # They lie in its run folder.
GLANCE = 128  # held-out prompts for the curves


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo: a model from scratch learns to sort words politely, under three minutes on a laptop's CPU."""

    out: Path = Path("runs/demo")
    """Folder for models, metrics, samples, summary.json and report.html."""
    seed: int = 0
    """Two runs with one seed on one machine give the same bits."""
    sft_steps: int = 300
    """Optimizer steps on demonstrations."""
    ranked_prompts: int = 3000
    """Prompts whose four responses annotators rank."""
    reward_steps: int = 150
    """Optimizer steps of the reward model."""
    weak_reward_steps: int = 50
    """Optimizer steps of the weak reward model of the hacking arm."""
    ppo_steps: int = 40
    """Rollouts of the main arm."""
    hack_prompts: int = 64
    """Ranked prompts behind the weak reward model of the hacking arm."""
    hack_steps: int = 40
    """Rollouts of the hacking arm, which has no KL penalty; 0 leaves the arm out."""
    test_prompts: int = 512
    """Held-out prompts for every number in the tables."""
    log_to: tuple[sinks.Name, ...] = ()
    """Where the metrics of every step go beside metrics.jsonl, as in other stages."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        settle(self)
        check_types(self)


class Demo:
    """One run: its folder, its random sources and its held-out prompts."""

    def __init__(self, cfg: DemoConfig) -> None:
        self.cfg = cfg
        sinks.check(cfg.log_to)
        refuse_others(Path(cfg.out), own=("demo", FOLDERS))
        refuse_links(Path(cfg.out), folders=FOLDERS)
        self.log = opened(cfg, "demo")
        self.source = random.Random(cfg.seed)
        self.test = demo_task.prompts(cfg.test_prompts, self.source, held_out=True)

    def file(self, name: str, records: Iterable[dict[str, Any]]) -> Path:
        """Training data as a file, like anybody's."""
        path = self.cfg.out / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return path

    def judged(self, policy: Policy) -> Judged:
        """The policy before the judge, on all held-out prompts."""
        return judged(policy, self.test, seed=self.cfg.seed)

    def sft(self) -> Policy:
        """A random model learns from imperfect demonstrations, each seen once."""
        tokenizer = word_tokenizer(demo_task.VOCABULARY)
        tiny_policy(tokenizer, self.cfg.seed).save(self.cfg.out / "base")
        asked = demo_task.prompts(self.cfg.sft_steps * SFT_BATCH, self.source, held_out=False)
        shown = [{"prompt": p, "response": demo_task.demonstrate(p, self.source)} for p in asked]
        stage = sft.SFTConfig(
            model=str(self.cfg.out / "base"), data=self.file("demonstrations.jsonl", shown), out=self.cfg.out / "sft",
            seed=self.cfg.seed, steps=self.cfg.sft_steps, batch_size=SFT_BATCH, lr=2e-3,
        )  # fmt: skip
        mark(stage, "sft")  # Our folder is marked, and so those in it are ours, also of an earlier version.
        return sft.sft(stage, self.log)

    def ranked(self, policy: Policy, prompts: Sequence[str], noise: float) -> list[dict[str, Any]]:
        """Four sampled responses to each prompt, ranked by an annotator, or by the judge where ``noise`` is 0.

        Repeated responses are shown once; a prompt with a single answer, or an empty one, has nothing to rank.
        """
        drawn = judged(policy, [p for p in prompts for _ in range(K)], seed=self.cfg.seed + 17)
        records = []
        for i, prompt in enumerate(prompts):
            at = range(i * K, (i + 1) * K)
            heard = list({drawn.responses[j]: not drawn.rollout.truncated[j] for j in at}.items())
            if len(heard) > 1 and all(text for text, _ in heard):
                ranks = demo_task.annotate(prompt, heard, self.source, noise)
                records.append({"prompt": prompt, "responses": [text for text, _ in heard], "ranks": ranks})
        return records

    def reward(self, name: str, data: Path, held_out: Path, steps: int) -> reward_model.Trained:
        """A reward model from rankings, with its accuracy on held-out pairs as the judge orders them."""
        stage = reward_model.RewardConfig(
            model=str(self.cfg.out / "sft"), data=data, out=self.cfg.out / name, seed=self.cfg.seed,
            steps=steps, batch_size=32, lr=5e-4, calibration_new_tokens=MAX_NEW_TOKENS, eval_data=held_out,
        )  # fmt: skip
        mark(stage, "reward")
        return reward_model.reward_model(stage, self.log, name=name)

    def ppo(self, name: str, rewarding: str, before: Judged, **options: Any) -> Policy:
        """PPO against a reward model, with a glance at the judge every few steps, from which nothing learns."""

        def glance(policy: Policy) -> dict[str, float]:
            now = judged(policy, self.test[:GLANCE], seed=self.cfg.seed + 1)
            wins = now.against(before.first(GLANCE))
            return {
                "eval/win_rate": wins.value, "eval/win_rate_low": wins.low, "eval/win_rate_high": wins.high,
                "eval/judge": now.judge.value, "eval/exact": now.exact.value,
            }  # fmt: skip

        stage = PPOConfig(
            model=str(self.cfg.out / "sft"), reward=str(self.cfg.out / rewarding), out=self.cfg.out / name,
            data=self.cfg.out / "data" / "prompts.jsonl", seed=self.cfg.seed, max_new_tokens=MAX_NEW_TOKENS,
            gold_reward="trainer.demo.task:hidden_judge", **options,
        )  # fmt: skip
        mark(stage, "ppo")
        return rl_stage.ppo(stage, self.log, name=name, evaluate=glance)

    def arm(self, trained: reward_model.Trained, before: Judged, policy: Policy) -> Arm:
        """The judge's and the reward model's view of one policy."""
        after = self.judged(policy)
        with torch.no_grad():
            packs = [x.rollout.pack(policy.weight.device) for x in (before, after)]
            scores = [trained.model.scores(packed).tolist() for packed in packs]
        return Arm(trained.accuracy, after, scores[0], scores[1])

    def table(self, title: str, now: Judged, before: Judged | None = None) -> None:
        """One table, with 95 % intervals."""
        seen = measures(now, before)
        self.log.table(title, [(name.replace("_", " "), str(value)) for name, value in seen.items()])


ABOUT = """\
A small model from scratch learns to sort five words and to be polite about it:
SFT on imperfect demonstrations, a reward model from noisy rankings, then PPO.
In the tables, all on held-out prompts: judge is a hidden score that nothing
trains on, exact the share of right answers, clean that of polite ones without
oddities. At the end, PPO against a weak reward model shows reward hacking."""


def demo(cfg: DemoConfig) -> dict[str, Any]:
    """All stages; returns what it writes to ``summary.json``."""
    demo = Demo(cfg)
    demo.log.note(ABOUT)
    about = sinks.About(Path(cfg.out), plain(cfg), quiet=cfg.quiet, several=True)
    with sinks.Sinks(cfg.log_to, about, demo.log.warn) as demo.log.sinks:
        return _stages(demo)


def _stages(demo: Demo) -> dict[str, Any]:
    cfg, clock = demo.cfg, Clock()
    policy = demo.sft()
    clock.lap("sft")
    before = demo.judged(policy)
    demo.table("SFT, on held-out prompts", before)

    asked = demo_task.prompts(cfg.ranked_prompts, demo.source, held_out=False)
    demo.file("prompts.jsonl", ({"prompt": p} for p in asked))
    rankings = demo.ranked(policy, asked, NOISE)
    full = demo.file("ranked.jsonl", rankings)
    held_out = demo.file("held_out.jsonl", demo.ranked(policy, demo.test[: cfg.test_prompts // 2], 0.0))
    clock.lap("ranking")

    strong = demo.reward("reward", full, held_out, cfg.reward_steps)
    clock.lap("reward")
    main = demo.ppo("ppo", "reward", before, steps=cfg.ppo_steps, kl_coef=0.1)
    clock.lap("ppo")
    arms = {"ppo": demo.arm(strong, before, main)}
    demo.table("PPO, on held-out prompts", arms["ppo"].after, before)
    if cfg.hack_steps:
        demo.log.note(f"The other way: a reward model from {cfg.hack_prompts} rankings, and no KL penalty.")
        few = demo.file("ranked_few.jsonl", rankings[: cfg.hack_prompts])
        weak = demo.reward("weak_reward", few, held_out, cfg.weak_reward_steps)
        clock.lap("weak_reward")
        hacked = demo.ppo("hack", "weak_reward", before, steps=cfg.hack_steps, kl_coef=0.0)
        clock.lap("hack")
        arms["hack"] = demo.arm(weak, before, hacked)
        demo.table("PPO without a leash, on held-out prompts", arms["hack"].after, before)
    return summarise(demo.log, before, arms, clock.seconds, clock.cpu_seconds)


class Clock:
    """Seconds per stage, on the wall and of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.last = time.perf_counter(), time.process_time()

    def lap(self, stage: str) -> None:
        """Books the time since the last lap under ``stage``."""
        now = time.perf_counter(), time.process_time()
        self.seconds[stage], self.cpu_seconds[stage] = now[0] - self.last[0], now[1] - self.last[1]
        self.last = now
