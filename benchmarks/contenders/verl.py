"""verl: its Triton linear cross-entropy, and its chunks in torch. Neither needs the rest of verl."""

from __future__ import annotations

from torch import Tensor

from benchmarks.contenders.base import LogpOf, LogpPeer, ScoreOf
from benchmarks.contenders.loading import module

BARE = ("verl", "verl.utils")


def score() -> ScoreOf:
    return module("verl.utils.experimental.torch_functional", BARE).FusedLinearForPPO()


def logp() -> LogpOf:
    run = score()
    return lambda *head: run(*head)[0]


def triton_score() -> ScoreOf:
    kernel = module("verl.utils.kernel.linear_cross_entropy", BARE).linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(hidden, weight, targets, 1.0, "none", None)

    return run


def triton_logp() -> LogpOf:
    run = triton_score()
    return lambda *head: run(*head)[0]


LOGP = (
    LogpPeer("verl FusedLinearForPPO", logp, score),
    LogpPeer("verl linear_cross_entropy (Triton)", triton_logp, triton_score, gpu=True),
)
LOSSES: dict = {}
