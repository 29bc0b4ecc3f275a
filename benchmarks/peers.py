"""Peers that meet the head. Entry points and defaults are theirs; only the calls are ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BETA, CLIP, Batch
from benchmarks.truth import Result

LogpOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, targets) -> logp, differentiable
ScoreOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # -> logp, entropy
EVERY = ("train", "grpo", "dpo", "dpo_prompts", "sparse", "sparse_kept")


class Skipped(Exception):
    """A contender that is there and yet does not enter; the message says why."""


def unable() -> Any:
    raise Skipped("it has no such output")


@dataclass(frozen=True)
class LogpPeer:
    name: str
    load: Callable[[], LogpOf]
    load_score: Callable[[], ScoreOf] = unable
    ops: tuple[str, ...] = EVERY
    compiles: bool = False
    most_logits: int | None = None  # not run on batches of more logits


def _materialised_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()  # logits in the model's dtype, then float32, as transformers does
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _materialised_score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.t()).float().log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def _compiled(function: Callable) -> Callable:
    import torch._dynamo

    # Past its limit torch.compile would quietly run eagerly, and be reported as what it is not.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def _trl(outputs: tuple[str, ...]) -> Callable:
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)

    return run


def _trl_logp() -> LogpOf:
    run = _trl(())
    return lambda *head: run(*head)[0]


def _trl_score() -> ScoreOf:
    run = _trl(("entropy",))
    return lambda *head: run(*head)[:2]  # type: ignore[return-value]


def _liger(with_entropy: bool) -> Callable:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda *head: LigerFusedLinearScaledCrossEntropyFunction.apply(*head, return_entropy=with_entropy)


def _liger_logp() -> LogpOf:
    run = _liger(False)
    return lambda *head: -run(*head)


def _liger_score() -> ScoreOf:
    run = _liger(True)

    def score(*head: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = run(*head)
        return -nll, entropy

    return score


def _verl_score() -> ScoreOf:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()


def _verl_logp() -> LogpOf:
    run = _verl_score()
    return lambda *head: run(*head)[0]


def _torch_linear_cross_entropy() -> LogpOf:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("needs torch 2.13")
    return lambda *head: -F.linear_cross_entropy(*head, reduction="none").float()


LOGP_PEERS = (
    LogpPeer("torch, materialised", lambda: _materialised_logp, lambda: _materialised_score),
    LogpPeer(
        "torch.compile, materialised",
        lambda: _compiled(_materialised_logp),
        lambda: _compiled(_materialised_score),
        compiles=True,
    ),
    LogpPeer("TRL ChunkedLogProbFunction", _trl_logp, _trl_score, ("train",)),
    LogpPeer("Liger scaled cross-entropy", _liger_logp, _liger_score, ("train", "sparse", "sparse_kept")),
    LogpPeer("verl FusedLinearForPPO", _verl_logp, _verl_score, ("train",)),
    LogpPeer("torch linear_cross_entropy", _torch_linear_cross_entropy, ops=("train",), most_logits=2**26),
)


def _liger_grpo(batch: Batch) -> Callable[[], Result]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    s = batch.cu_seqlens.numel() - 1
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=CLIP[0], epsilon_high=CLIP[1], loss_type="dapo"
    )
    hidden = batch.hidden.detach().view(s, -1, batch.hidden.shape[-1]).requires_grad_()
    weight = batch.weight.detach().requires_grad_()
    targets, old_logp, mask = (x.view(s, -1) for x in (batch.targets, batch.old_logp, batch.kept.float()))
    advantages = batch.advantages.view(s, -1)[:, 0].contiguous()

    def step() -> Result:
        loss, _ = loss_of(hidden, weight, targets, mask, advantages, old_per_token_logps=old_logp)
        return Result(loss, None, None, *torch.autograd.grad(loss, (hidden, weight)))

    return step


def _liger_dpo(compiled: bool) -> Callable[[Batch], Callable[[], Result]]:
    def build(batch: Batch) -> Callable[[], Result]:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss_of = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, use_ref_model=True)
        pairs, width = (batch.cu_seqlens.numel() - 1) // 2, batch.hidden.shape[-1]

        def chosen_first(x: Tensor) -> Tensor:
            return x.view(pairs, 2, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

        assert batch.ref_hidden is not None
        hidden = chosen_first(batch.hidden).detach().requires_grad_()
        weight = batch.weight.detach().requires_grad_()
        targets = chosen_first(batch.targets.masked_fill(~batch.kept, -100))
        ref_hidden = chosen_first(batch.ref_hidden)

        def step() -> Result:
            loss, _ = loss_of(weight, hidden, targets, ref_input=ref_hidden, ref_weight=batch.ref_weight)
            grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
            return Result(loss, None, None, grad_hidden.view(2, pairs, -1, width).transpose(0, 1), grad_weight)

        return step

    return build


LIGER_DPO = (("Liger DPO loss", _liger_dpo(False), False), ("Liger DPO loss, compiled", _liger_dpo(True), True))
OWN_LOSSES: dict[str, tuple[tuple[str, Callable, bool], ...]] = {
    "grpo": (("Liger GRPO loss", _liger_grpo, False),),
    "dpo": LIGER_DPO,
    "dpo_prompts": LIGER_DPO,
}
