"""PPO with a value model and a KL penalty in the reward.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

import rlhf_kernels as rk
from trainer import data
from trainer.experience import Experience, collect
from trainer.kl import KLController
from trainer.log import RunLog
from trainer.models import Policy, ScalarModel, frozen, resolve, scalar_from
from trainer.packing import split
from trainer.rewards import responses_of, reward_from
from trainer.rollout import sample
from trainer.stage import Optimizer, StageConfig, autocast, generator, policy_for, prepare, scalar_for, shuffled
from trainer.text import encode_prompts

MOSTLY = 0.95


@dataclass(frozen=True, kw_only=True)
class PPOConfig(StageConfig):
    """PPO on {"prompt", ...} records; the other fields go to a reward function."""

    reward: str
    """A reward model's folder, module:function, or "exact_answer" (the last number is that of the field answer)."""
    value_model: str | None = None
    """Where the value model starts; by default from the reward model, or from the policy if a function rewards."""
    steps: int = 60
    """Rollouts; each is followed by epochs x minibatches optimizer steps."""
    batch_size: int = 128
    """Prompts per rollout, one response each."""
    lr: float = 3e-4
    """Peak learning rate of the policy."""
    value_lr: float = 1e-3
    """Peak learning rate of the value model."""
    warmup_steps: int = 10
    """Optimizer steps over which both learning rates rise from zero."""
    adam_eps: float = 1e-5
    """Added to the denominator of Adam."""
    max_new_tokens: int = 64
    """Longest response."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability in training."""
    kl_coef: float = 0.1
    """Reward lost per nat between policy and reference."""
    kl_target_per_seq: float | None = None
    """Adapts the coefficient towards this KL in nats per sequence; None keeps it fixed."""
    kl_horizon: float = 10_000.0
    """Sequences over which the adaptation acts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """How far a ratio may leave one."""
    value_clip: float | None = 0.2
    """How far a value may move from the sampled one; None is as far as it likes."""
    entropy_coef: float = 0.0
    """Reward of entropy, per nat and token."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 2
    """Optimizer steps per pass."""
    truncation: Literal["penalise", "bootstrap", "mask"] = "penalise"
    """A response cut off by the limit: gets a fixed score, has its future estimated, or is left out of the loss."""
    truncation_score: float = -2.0
    """The fixed score, in the unit of normalised rewards."""
    eval_every: int = 10
    """Steps between evaluations, where the caller brings one."""


def policy_loss(cfg: PPOConfig, policy: Policy, part: Experience, num_tokens: int) -> rk.LossOutput:
    """Clipped loss of one micro-batch under the number of tokens of its minibatch."""
    return rk.ppo_loss(
        policy.hidden(part.packed), policy.weight, part.packed.targets, part.old_logp, part.advantages,
        clip=(cfg.clip, cfg.clip), entropy_coef=cfg.entropy_coef, num_tokens=num_tokens,
        temperature=cfg.temperature, **policy.head,
    )  # fmt: skip


def value_loss(cfg: PPOConfig, value: ScalarModel, part: Experience, num_tokens: int) -> rk.LossOutput:
    """Clipped squared error of one micro-batch under the number of tokens of its minibatch."""
    return rk.value_loss(
        value.values(part.packed), part.returns,
        old_values=part.values, clip=cfg.value_clip, mask=part.packed.mask, num_tokens=num_tokens,
    )  # fmt: skip


def train(
    cfg: PPOConfig,
    log: RunLog | None = None,
    *,
    name: str = "ppo",
    evaluate: Callable[[Policy], dict[str, float]] | None = None,
) -> Policy:
    """Trains a policy and saves it, with its value model, in ``cfg.out``.

    Args:
        cfg: The configuration.
        log: Where to log; None makes a log in ``cfg.out``.
        name: Of the stage in the log.
        evaluate: Called before the first step, every ``cfg.eval_every`` steps and at the end; its results are logged.
    """
    device = prepare(cfg)
    own, log = log is None, log or RunLog(cfg.out, quiet=cfg.quiet)
    records = data.read(cfg.data, "prompts", note=log.note)
    texts = [r["prompt"] for r in records]
    policy = policy_for(cfg, texts, device)
    reference = frozen(policy)
    reward = reward_from(
        cfg.reward, policy.tokenizer, max_length=cfg.max_length, max_tokens=cfg.max_tokens, device=device
    )
    value = _value_model(cfg, policy, texts)
    prompts = encode_prompts(policy.tokenizer, texts, max(cfg.max_length - cfg.max_new_tokens, 1))
    updates = cfg.steps * cfg.epochs * cfg.minibatches
    optimizers = (Optimizer(cfg, policy, updates), Optimizer(cfg, value, updates, lr=cfg.value_lr))
    control = KLController(cfg.kl_coef, cfg.kl_target_per_seq, cfg.kl_horizon)
    sampling, shuffling = generator(cfg, 1, device), generator(cfg, 2)
    metrics: dict[str, float] = {}
    with log.start(name, cfg.steps) as bar:
        for step, indices in enumerate(islice(shuffled(len(prompts), cfg.batch_size, cfg.seed), cfg.steps)):
            extra = evaluate(policy) if evaluate is not None and step == 0 else {}
            began = time.perf_counter()
            with autocast(cfg, device):
                batch, metrics = collect(
                    cfg, policy, reference, value, reward, control.coef,
                    [prompts[i] for i in indices], [records[i] for i in indices], sampling,
                )  # fmt: skip
            sampled = time.perf_counter()
            if batch is not None:
                metrics |= update(cfg, policy, value, optimizers, batch, shuffling)
                control.update(metrics["objective/kl"], len(batch.scores))
            metrics |= {
                "eps": len(indices) / (time.perf_counter() - began),
                "episode": float((step + 1) * cfg.batch_size),
                "timing/rollout": sampled - began,
                "timing/update": time.perf_counter() - sampled,
            }
            if evaluate is not None and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps):
                extra = evaluate(policy)
            bar.step(metrics | extra)
            if step == 0 and (cut := metrics["response/truncated"]) >= MOSTLY:
                log.note(
                    f"{cut:.0%} of the responses were cut off after {cfg.max_new_tokens} tokens, so that no end is "
                    "ever rewarded. Raise max_new_tokens, or start from a model that ends its responses."
                )
    policy.save(cfg.out / "model")
    value.save(cfg.out / "value")
    if own:
        _show(cfg, log, {"before": reference, "after": policy}, texts[:4])
        log.summary({name: metrics})
    return policy


def update(
    cfg: PPOConfig,
    policy: Policy,
    value: ScalarModel,
    optimizers: tuple[Optimizer, Optimizer],
    batch: Experience,
    shuffling: torch.Generator,
) -> dict[str, float]:
    """All epochs over one rollout."""
    device = policy.weight.device
    history: list[dict[str, float]] = []
    count = len(batch.scores)
    size = -(-count // cfg.minibatches)
    for _ in range(cfg.epochs):
        order = torch.randperm(count, generator=shuffling).tolist()
        for start in range(0, count, size):
            chosen = order[start : start + size]
            parts = parts_of(batch, chosen, cfg.max_tokens)
            tokens = [int(p.packed.mask.sum()) for p in parts]

            def of_policy(part: Experience, num_tokens: int = sum(tokens)) -> rk.LossOutput:
                with autocast(cfg, device):
                    return policy_loss(cfg, policy, part, num_tokens)

            def of_value(part: Experience, num_tokens: int = sum(tokens)) -> rk.LossOutput:
                with autocast(cfg, device):
                    return value_loss(cfg, value, part, num_tokens)

            mine = optimizers[0].step(parts, of_policy, tokens)
            theirs = optimizers[1].step(parts, of_value, tokens)
            history.append(mine | {"value/" + k: v for k, v in theirs.items()})
    return _named(history)


def parts_of(batch: Experience, chosen: Sequence[int], max_tokens: int) -> list[Experience]:
    """Micro-batches of the chosen sequences."""
    parts = split([batch.packed.lengths[i] for i in chosen], max_tokens)
    return [batch.select([chosen[i] for i in part]) for part in parts]


def _named(history: list[dict[str, float]]) -> dict[str, float]:
    """Averages over the optimizer steps of one rollout, under the names that PPO logs have had since 2019."""

    def mean(key: str) -> float:
        return sum(h.get(key, 0.0) for h in history) / len(history)

    ratio = mean("ratio")
    return {
        "policy/approxkl_avg": mean("approx_kl"),
        "policy/clipfrac_avg": mean("clipfrac"),
        "policy/entropy_avg": mean("entropy"),
        "policy/grad_norm": mean("grad_norm"),
        "loss/policy_avg": mean("loss"),
        "loss/value_avg": mean("value/loss"),
        "val/clipfrac_avg": mean("value/clipfrac"),
        "val/grad_norm": mean("value/grad_norm"),
        "val/ratio": ratio,
        "val/ratio_var": sum((h.get("ratio", 0.0) - ratio) ** 2 for h in history) / len(history),
        "val/ratio_first": history[0].get("ratio", 0.0),
        "lr": history[-1]["lr"],
        "skipped": history[-1]["skipped"] + history[-1]["value/skipped"],
    }


def _show(cfg: PPOConfig, log: RunLog, policies: dict[str, Policy], prompts: list[str]) -> None:
    """What a few prompts get before and after, by the same random numbers."""
    shown: list[dict[str, Any]] = [{"prompt": p} for p in prompts]
    for name, policy in policies.items():
        tokens = encode_prompts(policy.tokenizer, prompts, max(cfg.max_length - cfg.max_new_tokens, 1))
        source = generator(cfg, 3, policy.weight.device)
        rollout = sample(policy, tokens, max_new_tokens=cfg.max_new_tokens, generator=source)
        for row, text in zip(shown, responses_of(rollout, policy.tokenizer), strict=True):
            row[name] = text
    log.samples("Before and after PPO", shown)


def _value_model(cfg: PPOConfig, policy: Policy, texts: list[str]) -> ScalarModel:
    """Its head starts at zero: a reward model's head speaks of finished responses, and in raw scores."""
    device, vocabulary = policy.weight.device, policy.tokenizer.get_vocab()
    rewarding = (Path(resolve(cfg.reward)) / "config.json").exists()
    start = cfg.value_model or (cfg.reward if rewarding else cfg.model)
    value = scalar_for(cfg, start, texts, device)
    if value.tokenizer.get_vocab() != vocabulary:  # it reads the policy's token ids
        if cfg.value_model:
            raise ValueError(f"value_model: want the tokenizer of the policy, {cfg.value_model} has another")
        value = scalar_from(policy, generator(cfg, 7)).to(device)
    torch.nn.init.zeros_(value.head.weight)
    return value
