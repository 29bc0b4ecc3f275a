"""Supervised fine-tuning on demonstrations: the mean negative log-probability of response tokens.

Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.1 step 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rlhf_kernels as rk
from trainer.data import reading as data
from trainer.data.cursor import Cursor
from trainer.data.encoding import Note, encode_pairs
from trainer.data.packing import Packed, Sample, pack, within_budget
from trainer.models.policy import Policy
from trainer.models.rendering import render_as
from trainer.models.router import balanced, say_if_without
from trainer.run.log import RunLog
from trainer.training.defaults import decided
from trainer.training.optimizer import Optimizer
from trainer.training.options import TokenConfig
from trainer.training.precision import autocast
from trainer.training.progress import Progress
from trainer.training.session import Session
from trainer.training.setup import fitted, policy_for


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TokenConfig):
    """Supervised fine-tuning on {"prompt", "response"} records."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits."""
    eval_data: Path | None = None
    """Held-out demonstrations, for the table at the end."""


def loss(cfg: SFTConfig, policy: Policy, batch: Packed, num_tokens: int) -> rk.LossOutput:
    """Loss of one micro-batch under the number of target tokens of the whole step."""

    def own() -> rk.LossOutput:
        return rk.sft_loss(
            policy.hidden(batch), policy.weight, batch.targets,
            label_smoothing=cfg.label_smoothing, z_loss=cfg.z_loss, num_tokens=num_tokens, **policy.head,
        )  # fmt: skip

    return balanced(policy, int(batch.mask.sum()) / max(num_tokens, 1), own)


def micro_batches(samples: Sequence[Sample], max_tokens: int, device: torch.device | str) -> list[Packed]:
    """Packs of at most ``max_tokens`` tokens."""
    parts = within_budget([len(s.tokens) for s in samples], max_tokens)
    return [pack([samples[i] for i in part], device) for part in parts]


def held_out_loss(policy: Policy, samples: Sequence[Sample], max_tokens: int) -> float:
    """Mean negative log-probability of the response tokens, in nats."""
    total = count = 0.0
    with torch.no_grad():
        for batch in micro_batches(samples, max_tokens, policy.weight.device):
            total -= float(policy.stats(batch).logp.sum())
            count += int(batch.mask.sum())
    return total / max(count, 1)


@dataclass
class SFTState(Progress):
    """Everything that a step changes."""

    policy: Policy
    optimizer: Optimizer
    cursor: Cursor


def sft(cfg: SFTConfig, log: RunLog | None = None, *, resume: bool = False) -> Policy:
    """Trains a policy and saves it in ``cfg.out / "model"``.

    Args:
        cfg: The configuration.
        log: Where to log; None makes a log in ``cfg.out``.
        resume: Go on from the last checkpoint in ``cfg.out``, if there is one.
    """
    with Session(cfg, log, "sft", resume=resume) as session:
        log, device, cfg = session.log, session.device, decided(cfg)
        records = data.read(cfg.data, "demonstrations", render=render_as(cfg), note=log.note)
        policy = policy_for(cfg, [r["prompt"] + " " + r["response"] for r in records], device)
        cfg = fitted(cfg, policy, log.note)
        say_if_without(policy, log.note)
        samples = samples_of(cfg, policy, records, log.note)
        state = SFTState(
            policy, Optimizer(cfg, policy, cfg.steps, name="policy"), Cursor(len(samples), cfg.batch_size, cfg.seed)
        )
        for _ in session.steps(state, cfg.steps):
            batches = micro_batches([samples[i] for i in state.cursor.next()], cfg.max_tokens, device)
            tokens = [int(b.mask.sum()) for b in batches]

            def step_loss(batch: Packed, num_tokens: int = sum(tokens)) -> rk.LossOutput:
                with autocast(cfg, device):
                    return loss(cfg, policy, batch, num_tokens)

            session.done(state.optimizer.step(batches, step_loss, tokens))
        result = {"demonstrations": float(len(samples)), "last_loss": state.last["loss"]}
        if cfg.eval_data is not None:
            records = data.read(cfg.eval_data, "demonstrations", render=render_as(cfg), note=log.note)
            held_out = samples_of(cfg, policy, records, log.note)
            result["held_out_loss"] = held_out_loss(policy, held_out, cfg.max_tokens)
        log.table("Supervised fine-tuning", [(k.replace("_", " "), f"{v:.5g}") for k, v in result.items()])
        session.save(policy)
        if session.own:
            log.summary({"sft": result})
    return policy


def samples_of(
    cfg: SFTConfig, policy: Policy, records: Sequence[dict[str, Any]], note: Note | None = None
) -> list[Sample]:
    """Demonstrations as token sequences."""
    prompts, responses = [r["prompt"] for r in records], [r["response"] for r in records]
    return encode_pairs(policy.tokenizer, prompts, responses, cfg.max_length, note=note)
