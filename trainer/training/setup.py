"""What every stage does before it trains: checks its options, seeds, picks a device, loads its models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from trainer.base import ranks
from trainer.models.loading import load_policy, load_scalar
from trainer.models.policy import PackedModel, Policy, ScalarModel, scalar_from
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.run.folder import refuse_inputs
from trainer.training.options import StageConfig, check_options
from trainer.training.seeds import generator, seed_process

Config = TypeVar("Config", bound="StageConfig")


def prepare(cfg: StageConfig) -> torch.device:
    """Checks the configuration, seeds every generator and picks the device.

    Raises:
        ValueError: A number has no meaning, or the run would write over what it reads.
    """
    check_options(cfg)
    refuse_inputs(cfg)
    seed_process(cfg.seed)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    kind = auto if cfg.device == "auto" else cfg.device
    return torch.device(kind, ranks.local()) if kind == "cuda" and ranks.count() > 1 else torch.device(kind)


def policy_for(cfg: StageConfig, texts: Sequence[str], device: torch.device) -> Policy:
    """The model of the configuration; a tiny one learns its tokenizer from ``texts``."""
    policy = tiny_policy(byte_tokenizer(texts), cfg.seed) if cfg.model == "tiny" else load_policy(cfg.model)
    policy.tolerance = getattr(cfg, "tolerance", None)
    return policy.to(device)


def scalar_for(cfg: StageConfig, path: str, texts: Sequence[str], device: torch.device) -> ScalarModel:
    """A model with a scalar head from ``path``, which may also be "tiny"."""
    random_head = generator(cfg, 7)
    if path == "tiny":
        return scalar_from(policy_for(cfg, texts, torch.device("cpu")), random_head).to(device)
    return load_scalar(path, random_head).to(device)


def fitted(cfg: Config, model: PackedModel, note: Callable[[str], None]) -> Config:
    """The configuration with its longest sequence brought down to what a model has positions for.

    Args:
        cfg: Of the stage.
        model: That reads the sequences.
        note: Told where that makes a difference.

    Raises:
        ValueError: Nothing is left for a prompt.
    """
    limit, longest = model.limit, getattr(cfg, "max_new_tokens", 0)
    if limit is None or cfg.max_length <= limit:
        return cfg
    if longest >= limit:
        raise ValueError(f"max_new_tokens: got {longest}, want less than the {limit} positions of {cfg.model}")
    note(f"max_length: got {cfg.max_length}, and {cfg.model} has {limit} positions: sequences are cut to {limit}")
    return replace(cfg, max_length=limit)
