"""Kernels that compute cross-entropy alone: quack, Apple's CCE, flash-linear-attention. All need a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.contenders.base import LogpOf, LogpPeer, Own, mean_nll
from benchmarks.contenders.loading import module

LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, targets) -> mean


def _quack() -> LossOf:
    return module("quack.linear_cross_entropy").chunked_linear_cross_entropy


def _cce() -> LossOf:
    return module("cut_cross_entropy").linear_cross_entropy


def _cce_logp() -> LogpOf:
    loss_of = module("cut_cross_entropy").linear_cross_entropy
    return lambda *head: -loss_of(*head, reduction="none").float()


def _fla() -> LossOf:
    loss_of = module("fla.modules.fused_linear_cross_entropy", ("fla", "fla.modules")).FusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss_of(hidden[None], targets[None], weight)


LOGP = (LogpPeer("CCE, per token", _cce_logp, gpu=True, leaves_out=("sft",)),)
LOSSES = {
    "sft": (
        Own("quack chunked_linear_cross_entropy", mean_nll(_quack), gpu=True),
        Own("CCE linear_cross_entropy", mean_nll(_cce), gpu=True),
        Own("flash-linear-attention FusedLinearCrossEntropyLoss", mean_nll(_fla), gpu=True),
    ),
}
