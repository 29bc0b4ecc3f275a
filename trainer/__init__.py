"""The trainer: supervised fine-tuning, reward model, PPO, GRPO and preference learning, from Python.

A stage is a function of its config; its options are those of the command line:

    from trainer import SFTConfig, sft

    policy = sft(SFTConfig(model="tiny", data="demonstrations.jsonl", out="runs/sft", steps=100))

Importing this package is cheap and leaves torch alone: a stage is loaded when its name is first used. The trainer uses
`rlhf_kernels` through its public API only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.evaluation.stage import EvalConfig, evaluate
    from trainer.models.loading import load_policy, load_scalar
    from trainer.stages.preference.dpo import DPOConfig, IPOConfig, ORPOConfig, SimPOConfig, dpo, ipo, orpo, simpo
    from trainer.stages.preference.kto import KTOConfig, kto
    from trainer.stages.reward_model import RewardConfig, reward_model
    from trainer.stages.rl.grpo import GRPOConfig
    from trainer.stages.rl.ppo import PPOConfig
    from trainer.stages.rl.stage import grpo, ppo
    from trainer.stages.sft import SFTConfig, sft
    from trainer.stages.split import SplitConfig, split

_WHERE = {
    "evaluation.stage": ("EvalConfig", "evaluate"),
    "models.loading": ("load_policy", "load_scalar"),
    "stages.preference.dpo": (
        "DPOConfig", "IPOConfig", "ORPOConfig", "SimPOConfig", "dpo", "ipo", "orpo", "simpo",
    ),
    "stages.preference.kto": ("KTOConfig", "kto"),
    "stages.reward_model": ("RewardConfig", "reward_model"),
    "stages.rl.grpo": ("GRPOConfig",),
    "stages.rl.ppo": ("PPOConfig",),
    "stages.rl.stage": ("grpo", "ppo"),
    "stages.sft": ("SFTConfig", "sft"),
    "stages.split": ("SplitConfig", "split"),
}  # fmt: skip
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "DPOConfig",
    "EvalConfig",
    "GRPOConfig",
    "IPOConfig",
    "KTOConfig",
    "ORPOConfig",
    "PPOConfig",
    "RewardConfig",
    "SFTConfig",
    "SimPOConfig",
    "SplitConfig",
    "dpo",
    "evaluate",
    "grpo",
    "ipo",
    "kto",
    "load_policy",
    "load_scalar",
    "orpo",
    "ppo",
    "reward_model",
    "sft",
    "simpo",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
