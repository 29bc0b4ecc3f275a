"""Which subcommands there are, and where each of them lives."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """Where a subcommand lives; imported only when it is asked for."""

    module: str
    config: str
    run: str
    about: str


STAGES = {
    "demo": Stage(
        "trainer.demo.stage", "DemoConfig", "demo", "SFT, reward model and PPO from scratch, on a laptop CPU"
    ),
    "sft": Stage("trainer.stages.sft", "SFTConfig", "sft", "supervised fine-tuning on demonstrations"),
    "reward": Stage(
        "trainer.stages.reward_model",
        "RewardConfig",
        "reward_model",
        "reward model on preference pairs or K-wise rankings",
    ),
    "ppo": Stage("trainer.stages.rl.stage", "PPOConfig", "ppo", "PPO with value model and KL control, on prompts"),
    "grpo": Stage("trainer.stages.rl.stage", "GRPOConfig", "grpo", "GRPO, Dr.GRPO, RLOO, REINFORCE++, on prompts"),
    "dpo": Stage(
        "trainer.stages.preference.dpo", "DPOConfig", "dpo", "direct preference optimisation, on pairs or rankings"
    ),
    "ipo": Stage(
        "trainer.stages.preference.dpo", "IPOConfig", "ipo", "preferences with a squared loss, which does not saturate"
    ),
    "kto": Stage(
        "trainer.stages.preference.kto", "KTOConfig", "kto", "on single replies, each labelled desirable or not"
    ),
    "orpo": Stage(
        "trainer.stages.preference.dpo", "ORPOConfig", "orpo", "preferences and demonstrations at once, no reference"
    ),
    "simpo": Stage(
        "trainer.stages.preference.dpo", "SimPOConfig", "simpo", "on pairs, by mean log-probability, no reference"
    ),
    "split": Stage(
        "trainer.stages.split", "SplitConfig", "split", "two files out of one: what to train on, and what not"
    ),
    "eval": Stage(
        "trainer.evaluation.stage", "EvalConfig", "evaluate", "win rate, held-out loss and tasks, before and after"
    ),
}
SPREAD = ("sft", "reward", "ppo", "grpo", "dpo", "ipo", "kto", "orpo", "simpo", "resume")  # over several processes
TOOLS = {
    "inspect": ("trainer.inspect.command", "what decides the worth of preference data, before you train on it"),
    "doctor": ("trainer.cli.doctor", "what this machine has, and what will be slow on it"),
}
