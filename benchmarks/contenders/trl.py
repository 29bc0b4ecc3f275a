"""TRL 1.16: kernels that fold the logits tile by tile, and its functions of logits."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.contenders.base import LogpOf, LogpPeer, Own, ScoreOf, mean_kl
from benchmarks.contenders.loading import module
from benchmarks.contenders.plain_torch import from_logits

BARE = ("trl", "trl.trainer")
STUBS: dict[str, dict[str, Any]] = {
    # without a sharded head there is nothing to gather
    "trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *_, **__: contextlib.nullcontext()},
    "transformers.utils": {"is_triton_available": lambda *_, **__: importlib.util.find_spec("triton") is not None},
}
VOCAB_CHUNK = 32768  # the default of TRL's trainers


def _chunked(outputs: tuple[str, ...]) -> Callable[..., tuple[Tensor, ...]]:
    kernel = module("trl.kernels.chunked_logprob", BARE, STUBS).ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return kernel.apply(hidden, weight, None, targets, 1.0, VOCAB_CHUNK, None, 1.0, outputs)

    return run


def logp() -> LogpOf:
    run = _chunked(())
    return lambda *head: run(*head)[0]


def score() -> ScoreOf:
    run = _chunked(("entropy",))
    return lambda *head: run(*head)[:2]  # type: ignore[return-value]


def reverse_kl() -> Callable[..., Tensor]:
    kernel = module("trl.kernels.chunked_divergence", BARE, STUBS).ChunkedDivergenceFunction

    def run(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        return kernel.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]

    return run


def _fused() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return module("trl.kernels.logprob_entropy", BARE, STUBS).selective_log_softmax_and_entropy


def _separate() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    utils = module("trl.trainer.utils")
    return lambda logits, targets: (
        utils.selective_log_softmax(logits, targets),
        utils.entropy_from_logits(logits.detach()),
    )


LOGP = (LogpPeer("TRL ChunkedLogProbFunction", logp, score),)
LOSSES = {
    "kl": (Own("TRL ChunkedDivergenceFunction", mean_kl(reverse_kl)),),
    "logits": (
        Own("TRL selective_log_softmax_and_entropy", from_logits(_fused), gpu=True),
        Own("TRL selective_log_softmax, entropy_from_logits", from_logits(_separate)),
    ),
}
