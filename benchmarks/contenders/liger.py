"""Liger: chunked losses, scaled cross-entropy (CuTe on Hopper, torch elsewhere), and in Triton cross-entropy and policy
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import (
    Build,
    LogpOf,
    LogpPeer,
    Own,
    Padding,
    ScoreOf,
    Step,
    chosen_first,
    kept_rows,
    mean_nll,
    training,
)
from benchmarks.contenders.loading import module
from benchmarks.work.cases import BETA, CLIP, KTO_KL, Batch
from benchmarks.work.objectives import reinforced


def _scaled(with_entropy: bool) -> Callable:
    found = module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    kernel = found.LigerFusedLinearScaledCrossEntropyFunction
    return lambda *head: kernel.apply(*head, return_entropy=with_entropy)


def logp() -> LogpOf:
    run = _scaled(False)
    return lambda *head: -run(*head)


def score() -> ScoreOf:
    run = _scaled(True)

    def both(*head: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = run(*head)
        return -nll, entropy

    return both


def _loss(name: str, **options: Any) -> Any:
    return getattr(module("liger_kernel.chunked_loss"), name)(**options)


def grpo(op: str) -> Build:
    def build(batch: Batch) -> Step:
        loss_of = _loss(
            "LigerFusedLinearGRPOLoss", beta=0.0, compiled=False, use_ref_model=False, epsilon_low=CLIP[0],
            epsilon_high=CLIP[1], loss_type="dapo",
        )  # fmt: skip
        pad = Padding(batch, op)
        fixed = pad(batch.targets), pad(batch.kept.float()), batch.advantages[batch.cu_seqlens[:-1]]
        old_logp = pad(batch.old_logp)
        return training(
            batch, lambda hidden, weight: (loss_of(pad(hidden), weight, *fixed, old_per_token_logps=old_logp)[0], None)
        )

    return build


def policy_gradient(batch: Batch) -> Step:
    """PPO by score centering that does not centre: the gradient is PPO's, the value is not; see ``reinforced``."""
    found = module("liger_kernel.ops.fused_linear_score_centering", ("liger_kernel", "liger_kernel.ops"))
    correction = found.ISCorrection(low=1 - CLIP[0], high=1 + CLIP[1], sign="ppo")
    head = batch.targets.new_empty(1, len(batch.targets), 0)  # nothing of the sampler's distribution but its token
    fixed = batch.targets[None], batch.kept[None], batch.advantages[None], batch.old_logp[None], head, head.float()
    options = {"score_center": False, "correction": correction}
    return training(
        batch,
        lambda hidden, weight: (found.fused_linear_score_centering(hidden[None], weight, *fixed, **options)[0], None),
        outputs=lambda: {"value": reinforced},
    )


def _paired(op: str, name: str, **options: Any) -> Build:
    """Losses over pairs, which Liger wants with all chosen replies first."""

    def build(batch: Batch) -> Step:
        loss_of = _loss(name, beta=BETA, **options)
        pad = Padding(batch, op, chosen_first(batch))
        targets = pad(batch.targets.masked_fill(~batch.kept, -100), -100)
        reference: dict[str, Any] = {}
        if batch.ref_hidden is not None:
            reference = {"ref_input": pad(batch.ref_hidden), "ref_weight": batch.ref_weight}
        return training(batch, lambda hidden, weight: (loss_of(weight, pad(hidden), targets, **reference)[0], None))

    return build


def dpo(op: str, compiled: bool) -> Build:
    return _paired(op, "LigerFusedLinearDPOLoss", compiled=compiled, use_ref_model=True)


def kto(compiled: bool) -> Build:
    def build(batch: Batch) -> Step:
        loss_of = _loss("LigerFusedLinearKTOLoss", beta=BETA, compiled=compiled, use_ref_model=True)
        assert batch.ref_hidden is not None
        pad = Padding(batch, "kto")
        targets = pad(batch.targets, -100)
        desirable = torch.arange(pad.sequences, device=targets.device) % 2 == 0
        baseline = torch.tensor(KTO_KL, device=targets.device)
        ref_hidden = pad(batch.ref_hidden)

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
            found = loss_of(
                pad(hidden), weight, targets, None, desirable, ref_input=ref_hidden, ref_weight=batch.ref_weight,
                kl=baseline,
            )  # fmt: skip
            return found[0], None

        return training(batch, forward)

    return build


def jsd(batch: Batch) -> Step:
    """Its generalised divergence at the end where it is KL(student | teacher)."""
    loss_of = _loss(
        "LigerFusedLinearJSDLoss", weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False
    )  # fmt: skip
    rows = kept_rows(batch, "kl")
    assert batch.ref_hidden is not None
    ref_hidden, targets = batch.ref_hidden[rows], batch.targets[rows]
    return training(
        batch, lambda hidden, weight: (loss_of(hidden[rows], weight, ref_hidden, batch.ref_weight, targets), None)
    )


def _flce() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    found = module("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: found(weight, hidden, targets)


LOGP = (LogpPeer("Liger scaled cross-entropy", logp, score),)
LOSSES = {
    "sparse": (Own("Liger score centering", policy_gradient, gpu=True),),
    "sparse_kept": (Own("Liger score centering", policy_gradient, gpu=True),),
    "grpo": (Own("Liger GRPO loss", grpo("grpo")),),
    "grpo_groups": (Own("Liger GRPO loss", grpo("grpo_groups")),),
    "dpo": (Own("Liger DPO loss", dpo("dpo", False)), Own("Liger DPO loss, compiled", dpo("dpo", True), True)),
    "dpo_prompts": (
        Own("Liger DPO loss", dpo("dpo_prompts", False)),
        Own("Liger DPO loss, compiled", dpo("dpo_prompts", True), True),
    ),
    "kto": (Own("Liger KTO loss", kto(False)),),
    "orpo": (Own("Liger ORPO loss", _paired("orpo", "LigerFusedLinearORPOLoss", compiled=False)),),
    "kl": (Own("Liger JSD loss", jsd),),
    "sft": (Own("Liger FLCE (Triton)", mean_nll(_flce), gpu=True),),
}
