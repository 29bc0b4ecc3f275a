"""This library in the same ring, through its front door and with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.contenders.base import Build, Forward, Step, training
from benchmarks.contenders.plain_torch import from_logits
from benchmarks.work.cases import BETA, CLIP, KTO_KL, Batch
from benchmarks.work.objectives import weighted
from benchmarks.work.truth import Result
from rlhf_kernels.engine.call import MAX_BYTES, MAX_BYTES_GPU

GIB = 2**30
Head = dict[str, Any]  # HeadOptions


def default_budget(device: str = "cpu") -> int:
    """Of a device by its name, with or without its number."""
    return MAX_BYTES.get(torch.device(device).type, MAX_BYTES_GPU)


def _targets(batch: Batch) -> Tensor:
    return batch.targets.masked_fill(~batch.kept, -100)


def _trained(forward_of: Callable[[Batch], Forward]) -> Build:
    return lambda batch: training(batch, forward_of(batch))


def _token_stats(head: Head) -> Build:
    def forward_of(batch: Batch) -> Forward:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            logp = rk.token_stats(hidden, weight, batch.targets, **head).logp
            return weighted(logp, None, batch), logp

        return forward

    return _trained(forward_of)


def _fused_loss(head: Head) -> Build:
    def forward_of(batch: Batch) -> Forward:
        tokens, per_token = len(batch.targets), (batch.advantages,)

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            seen = []

            def objective(stats: rk.TokenStats, cu_seqlens: Tensor | None, advantages: Tensor):
                seen.append(stats.logp.detach())
                return -(advantages * stats.logp).sum() / tokens, {}

            loss = rk.fused_loss(hidden, weight, batch.targets, objective, per_token=per_token, **head).loss
            return loss, torch.cat(seen)

        return forward

    return _trained(forward_of)


def _score(head: Head) -> Build:
    def build(batch: Batch) -> Step:
        def step() -> Result:
            with torch.no_grad():
                stats = rk.token_stats(batch.hidden, batch.weight, batch.targets, **head)
            return Result(logp=stats.logp, entropy=stats.entropy)

        return step

    return build


def _loss(loss_of: Callable[..., rk.LossOutput], arguments: Callable[[Batch], dict[str, Any]], head: Head) -> Build:
    """A loss of the front door, whose further arguments a batch gives."""

    def forward_of(batch: Batch) -> Forward:
        targets, given = _targets(batch), arguments(batch)
        return lambda hidden, weight: (loss_of(hidden, weight, targets, **given, **head).loss, None)

    return _trained(forward_of)


def _scored(loss_of: Callable[..., rk.LossOutput], arguments: Callable[[Batch], dict[str, Any]], head: Head) -> Build:
    """The same for a loss whose reference is scored in the step."""

    def forward_of(batch: Batch) -> Forward:
        targets, given = _targets(batch), arguments(batch)
        assert batch.ref_hidden is not None
        assert batch.ref_weight is not None
        reference = batch.ref_hidden, batch.ref_weight

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                ref_logp = rk.token_stats(*reference, targets, **head).logp
            return loss_of(hidden, weight, targets, batch.cu_seqlens, ref_logp, **given, **head).loss, None

        return forward

    return _trained(forward_of)


def _kto(head: Head) -> Build:
    def arguments(batch: Batch) -> dict[str, Any]:
        desirable = torch.arange(batch.cu_seqlens.numel() - 1, device=batch.targets.device) % 2 == 0
        return {"desirable": desirable, "kl": KTO_KL, "beta": BETA}

    return _scored(rk.kto_loss, arguments, head)


def _kl(head: Head) -> Build:
    def build(batch: Batch) -> Step:
        targets, count, seen = _targets(batch), batch.kept.sum(), []

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
            assert batch.ref_hidden is not None
            assert batch.ref_weight is not None
            kl = rk.kl_divergence(hidden, weight, batch.ref_hidden, batch.ref_weight, targets, **head)
            seen[:] = [kl.detach()]
            return kl.sum() / count, None

        return training(batch, forward, outputs=lambda: {"kl": seen.pop()})

    return build


def _from_logits(head: Head) -> Build:
    def stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found = rk.token_stats_from_logits(logits, targets, **head)
        return found.logp, found.entropy

    return from_logits(lambda: stats)


def _grpo(batch: Batch) -> dict[str, Any]:
    return {
        "old_logp": batch.old_logp, "advantages": batch.advantages[batch.cu_seqlens[:-1]], "clip": CLIP,
        "cu_seqlens": batch.cu_seqlens,
    }  # fmt: skip


def _ppo(batch: Batch) -> dict[str, Any]:
    return {"old_logp": batch.old_logp, "advantages": batch.advantages, "clip": CLIP}


def _pairs(batch: Batch) -> dict[str, Any]:
    return {"cu_seqlens": batch.cu_seqlens, "beta": BETA}


def contenders(op: str, max_bytes: int | None, backend: str | None = None) -> list[tuple[str, Build]]:
    """Our entries for an op; the op that remembers logits also enters with room for all of them."""
    head: Head = {} if max_bytes is None else {"max_bytes": max_bytes}
    head |= {} if backend is None else {"backend": backend}
    beta: Callable[[Batch], dict[str, Any]] = lambda _: {"beta": BETA}  # noqa: E731
    entries: dict[str, list[tuple[str, Build]]] = {
        "train": [
            ("rk.token_stats", _token_stats(head)),
            ("rk.token_stats, 1 GiB", _token_stats(head | {"max_bytes": GIB})),
            ("rk.fused_loss", _fused_loss(head)),
        ],
        "score": [("rk.token_stats", _score(head))],
        "grpo": [("rk.grpo_loss", _loss(rk.grpo_loss, _grpo, head))],
        "dpo": [("rk.token_stats, rk.dpo_loss", _scored(rk.dpo_loss, beta, head))],
        "ipo": [("rk.token_stats, rk.ipo_loss", _scored(rk.ipo_loss, beta, head))],
        "kto": [("rk.token_stats, rk.kto_loss", _kto(head))],
        "orpo": [("rk.orpo_loss", _loss(rk.orpo_loss, _pairs, head))],
        "sft": [("rk.sft_loss", _loss(rk.sft_loss, lambda _: {}, head))],
        "kl": [("rk.kl_divergence", _kl(head))],
        "logits": [("rk.token_stats_from_logits", _from_logits(head))],
        "sparse": [("rk.ppo_loss", _loss(rk.ppo_loss, _ppo, head))],
    }
    same = {"grpo_groups": "grpo", "dpo_prompts": "dpo", "sparse_kept": "sparse"}
    return entries[same.get(op, op)]
