"""This library in the same ring, through its front door and with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.cases import BETA, CLIP, Batch
from benchmarks.objectives import weighted
from benchmarks.truth import Result
from rlhf_kernels.engine.call import MAX_BYTES

GIB = 2**30
Build = Callable[[Batch], Callable[[], Result]]


def default_budget() -> int:
    return MAX_BYTES["cpu"]


def _leaves(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()


def _token_stats(**head: Any) -> Build:
    def build(batch: Batch) -> Callable[[], Result]:
        hidden, weight = _leaves(batch)

        def step() -> Result:
            logp = rk.token_stats(hidden, weight, batch.targets, **head).logp
            loss = weighted(logp, None, batch)
            return Result(loss, logp, None, *torch.autograd.grad(loss, (hidden, weight)))

        return step

    return build


def _fused_loss(**head: Any) -> Build:
    def build(batch: Batch) -> Callable[[], Result]:
        hidden, weight = _leaves(batch)
        tokens = len(batch.targets)

        def step() -> Result:
            seen = []

            def objective(stats: rk.TokenStats, cu_seqlens: Tensor | None, advantages: Tensor):
                seen.append(stats.logp.detach())
                return -(advantages * stats.logp).sum() / tokens, {}

            per_token = (batch.advantages,)
            loss = rk.fused_loss(hidden, weight, batch.targets, objective, per_token=per_token, **head).loss
            return Result(loss, torch.cat(seen), None, *torch.autograd.grad(loss, (hidden, weight)))

        return step

    return build


def _score(**head: Any) -> Build:
    def build(batch: Batch) -> Callable[[], Result]:
        def step() -> Result:
            with torch.no_grad():
                stats = rk.token_stats(batch.hidden, batch.weight, batch.targets, **head)
            return Result(logp=stats.logp, entropy=stats.entropy)

        return step

    return build


def _grpo(**head: Any) -> Build:
    def build(batch: Batch) -> Callable[[], Result]:
        hidden, weight = _leaves(batch)
        advantages = batch.advantages[batch.cu_seqlens[:-1]]

        def step() -> Result:
            loss = rk.grpo_loss(
                hidden,
                weight,
                batch.targets,
                batch.old_logp,
                advantages,
                clip=CLIP,
                cu_seqlens=batch.cu_seqlens,
                **head,
            ).loss
            return Result(loss, None, None, *torch.autograd.grad(loss, (hidden, weight)))

        return step

    return build


def _dpo(**head: Any) -> Build:
    def build(batch: Batch) -> Callable[[], Result]:
        hidden, weight = _leaves(batch)
        assert batch.ref_hidden is not None
        ref_hidden, ref_weight = batch.ref_hidden, batch.ref_weight
        assert ref_weight is not None
        targets = batch.targets.masked_fill(~batch.kept, -100)

        def step() -> Result:
            with torch.no_grad():
                ref_logp = rk.token_stats(ref_hidden, ref_weight, targets, **head).logp
            loss = rk.dpo_loss(hidden, weight, targets, batch.cu_seqlens, ref_logp, beta=BETA, **head).loss
            return Result(loss, None, None, *torch.autograd.grad(loss, (hidden, weight)))

        return step

    return build


def _ppo(**head: Any) -> Build:
    def build(batch: Batch) -> Callable[[], Result]:
        hidden, weight = _leaves(batch)
        targets = batch.targets.masked_fill(~batch.kept, -100)

        def step() -> Result:
            loss = rk.ppo_loss(hidden, weight, targets, batch.old_logp, batch.advantages, clip=CLIP, **head).loss
            return Result(loss, None, None, *torch.autograd.grad(loss, (hidden, weight)))

        return step

    return build


def contenders(op: str, max_bytes: int | None) -> list[tuple[str, Build]]:
    """Our entries for an op; the op that remembers logits also enters with room for all of them."""
    head: dict[str, Any] = {} if max_bytes is None else {"max_bytes": max_bytes}
    if op == "train":
        return [
            ("rk.token_stats", _token_stats(**head)),
            ("rk.token_stats, 1 GiB", _token_stats(max_bytes=GIB)),
            ("rk.fused_loss", _fused_loss(**head)),
        ]
    name, make = {
        "score": ("rk.token_stats", _score),
        "grpo": ("rk.grpo_loss", _grpo),
        "dpo": ("rk.token_stats, rk.dpo_loss", _dpo),
        "dpo_prompts": ("rk.token_stats, rk.dpo_loss", _dpo),
        "sparse": ("rk.ppo_loss", _ppo),
        "sparse_kept": ("rk.ppo_loss", _ppo),
    }[op]
    return [(name, make(**head))]
