"""Options of the loop in ``trainer.stages.rl.loop``, shared by every stage that learns from its own responses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.rewards import shaping
from trainer.training.options import AUTO, Auto


@dataclass(frozen=True, kw_only=True)
class RLConfig(shaping.RewardOptions):
    """Options of every stage that learns from its own responses to {"prompt", ...} records."""

    steps: int = 60
    """Rollouts; each is followed by epochs x minibatches optimizer steps."""
    batch_size: int = 128
    """Prompts per rollout."""
    lr: Auto[float] = AUTO
    """Peak learning rate of the policy. What is "auto" depends on the model; a run begins by saying what it became."""
    warmup_steps: Auto[int] = AUTO
    """Optimizer steps over which learning rates rise from zero."""
    adam_eps: float = 1e-5
    """Added to the denominator of Adam."""
    sampler: Literal["cached", "generate"] = "cached"
    """Who samples: our own small loop, or transformers' generate, which knows more kinds of models and is slower."""
    sample_batch: int = 512
    """Responses in flight together. Ranks share these batches: with as many of them as ranks, every rank samples."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability in training."""
    top_p: float = 1.0
    """Samples from the likeliest tokens of this mass only; below one needs allow_top_p."""
    allow_top_p: bool = False
    """Accept that responses are then no samples of the policy, which every ratio is taken to."""
    importance_cap: float | None = None
    """Weighs each token by trainer's over sampler's probability, at most this much; None takes them for equal."""
    kl_coef: float = 0.1
    """Price of a nat between policy and reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where that price is paid: out of the reward, or as a term of the loss."""
    kl: Literal["k2", "k3", "k1+", "k3+"] = "k3+"
    """Estimator of the KL in the loss; with a plus, it has k2's gradient, which is that of the KL itself."""
    kl_target_per_seq: float | None = None
    """Adapts the coefficient towards this KL in nats per sequence; None keeps it fixed."""
    kl_horizon: float = 10_000.0
    """Sequences over which the adaptation acts."""
    clip: tuple[float, float] = (0.2, 0.2)
    """How far a ratio may fall below and rise above one."""
    entropy_coef: float = 0.0
    """Reward of entropy, per nat and token."""
    epochs: Auto[int] = AUTO
    """Passes over each rollout."""
    minibatches: Auto[int] = AUTO
    """Optimizer steps per pass."""
    ptx_coef: float = 0.0
    """Weight of the loss on ptx_data in every update (PPO-ptx), which keeps what the policy knew; 0 is without."""
    ptx_data: Path | None = None
    """Demonstrations for it."""
    ptx_batch_size: int = 32
    """Demonstrations per optimizer step."""
    eval_every: int = 10
    """Steps between evaluations: of tax_data, of probes, and of what the caller brings."""
    gold_reward: str | None = None
    """A second reward, named like the first, that is watched and never trained on."""
    tax_data: Path | None = None
    """Held-out text or demonstrations, whose loss is watched."""
    probes: Path | None = None
    """Probes for self-praise and sycophancy (docs/monitors.md)."""
    on_alarm: Literal["note", "stop", "raise_kl"] = "note"
    """What an alarm of the monitors does: it is written down, ends the run, or doubles kl_coef."""
    thresholds: tuple[str, ...] = ()
    """When alarms are raised, as NAME=NUMBER, e.g. kl_per_seq=30 (docs/monitors.md)."""


def check_rl(cfg: RLConfig) -> None:
    """Refuses what would fail, or mean nothing, only after work has begun.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    shaping.check_rewards(cfg)
    for name in ("max_new_tokens", "epochs", "minibatches", "ptx_batch_size", "eval_every", "sample_batch"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want at least 1")
    if cfg.max_new_tokens >= cfg.max_length:
        raise ValueError(
            f"max_new_tokens: got {cfg.max_new_tokens}, want less than max_length={cfg.max_length}, which holds "
            "the prompt, too"
        )
    for name in ("kl_coef", "entropy_coef", "ptx_coef"):
        if not getattr(cfg, name) >= 0:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want zero or more")
    for name in ("temperature", "kl_horizon", "kl_target_per_seq"):
        if (x := getattr(cfg, name)) is not None and not x > 0:
            raise ValueError(f"{name}: got {x}, want a positive number")
    if not min(cfg.clip) >= 0:
        raise ValueError(f"clip: got {cfg.clip}, want how far below and above one, zero or more")
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"top_p: got {cfg.top_p}, want a share of the probability, above zero and at most one")
    if cfg.top_p < 1 and (not cfg.allow_top_p or cfg.importance_cap is not None):
        raise ValueError(
            f"top_p: got {cfg.top_p}, want 1: the sampler would leave out tokens that the policy does not, so that "
            "ratios, KL and importance weights are biased. allow_top_p accepts that, but not with importance_cap"
        )
    if cfg.importance_cap is not None and not cfg.importance_cap >= 1:
        raise ValueError(f"importance_cap: got {cfg.importance_cap}, want at least 1, or None")
    if cfg.ptx_coef and cfg.ptx_data is None:
        raise ValueError(f"ptx_data: want a file of demonstrations for ptx_coef={cfg.ptx_coef}")
