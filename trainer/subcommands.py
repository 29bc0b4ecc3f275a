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
    "demo": Stage("trainer.demo", "DemoConfig", "run", "SFT, reward model and PPO from scratch, on a laptop CPU"),
    "sft": Stage("trainer.sft", "SFTConfig", "train", "supervised fine-tuning on demonstrations"),
    "reward": Stage("trainer.reward", "RewardConfig", "train", "reward model on preference pairs or K-wise rankings"),
    "ppo": Stage("trainer.ppo", "PPOConfig", "train", "PPO with value model and KL control, on prompts"),
    "grpo": Stage("trainer.grpo", "GRPOConfig", "train", "GRPO, Dr.GRPO, RLOO, REINFORCE++, on prompts"),
    "dpo": Stage("trainer.pairs", "DPOConfig", "dpo", "direct preference optimisation, on pairs or rankings"),
    "ipo": Stage("trainer.pairs", "IPOConfig", "ipo", "the same with a squared loss, which does not saturate"),
    "kto": Stage("trainer.kto", "KTOConfig", "train", "on single replies, each labelled desirable or not"),
    "orpo": Stage("trainer.pairs", "ORPOConfig", "orpo", "preferences and demonstrations at once, no reference"),
    "simpo": Stage("trainer.pairs", "SimPOConfig", "simpo", "on pairs, by mean log-probability, no reference"),
    "split": Stage("trainer.split", "SplitConfig", "run", "two files out of one: what to train on, and what not"),
    "eval": Stage("trainer.evaluation", "EvalConfig", "run", "win rate, held-out loss and tasks, before and after"),
}
SPREAD = ("sft", "reward", "ppo", "grpo", "dpo", "ipo", "kto", "orpo", "simpo", "resume")  # over several processes
TOOLS = {
    "inspect": ("trainer.inspect_data", "what decides the worth of preference data, before you train on it"),
    "doctor": ("trainer.doctor", "what this machine has, and what will be slow on it"),
}
