"""The value model of PPO: where it starts."""

from __future__ import annotations

import torch
from torch import nn

from trainer.models.policy import Policy, ScalarModel, scalar_from
from trainer.rewards.names import is_model, sources_of
from trainer.stages.rl.ppo import SHARED, PPOConfig
from trainer.stages.rl.shared_value import SharedValue
from trainer.training.seeds import generator
from trainer.training.setup import scalar_for


def value_model_for(cfg: PPOConfig, policy: Policy, texts: list[str]) -> ScalarModel | SharedValue:
    """The value model that the options name. Its head starts at zero: a reward model's head speaks of finished
    responses, and in raw scores.

    Args:
        cfg: The configuration.
        policy: Whose token ids it reads.
        texts: A tiny model learns its tokenizer from these.

    Raises:
        ValueError: A model was named that has another tokenizer.
    """
    if cfg.value_model == SHARED:
        return SharedValue(policy)
    device, vocabulary = policy.weight.device, policy.tokenizer.get_vocab()
    rewarding = [source for option, source in sources_of(cfg) if option == "reward" and is_model(source)]
    start = cfg.value_model or (rewarding[0] if rewarding else cfg.model)
    value = scalar_for(cfg, start, texts, device)
    if value.tokenizer.get_vocab() != vocabulary:  # it reads the policy's token ids
        if cfg.value_model:
            raise ValueError(f"value_model: want the tokenizer of the policy, {cfg.value_model} has another")
        value = scalar_from(policy, generator(cfg, 7)).to(device)
    torch.nn.init.zeros_(value.head.weight)
    return value


def trained_together(policy: Policy, value: ScalarModel | SharedValue | None) -> nn.Module:
    """What the policy's optimizer moves: a value head that shares the backbone goes with it."""
    return nn.ModuleList([policy, value]) if isinstance(value, SharedValue) else policy
