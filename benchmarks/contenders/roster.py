"""Who is compared, each used as its own users would. One that is not installed says so when it is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.contenders import cross_entropy, liger, ours, plain_torch, trl, verl
from benchmarks.contenders.base import (
    Build,
    Contender,
    LogpPeer,
    Own,
    Skipped,
    Step,
    kept_rows,
    training,
    unable,
    wants_gpu,
)
from benchmarks.work.cases import PREFERENCES, Batch
from benchmarks.work.objectives import LOSSES
from benchmarks.work.truth import Result

# Entry points and defaults of the peers are theirs; only the calls are ours.
ADAPTERS = (plain_torch, trl, liger, verl, cross_entropy)
LOGP_PEERS = tuple(peer for adapter in ADAPTERS for peer in adapter.LOGP)
OPS = sorted({op for adapter in ADAPTERS for op in adapter.LOSSES})
OWN_LOSSES: dict[str, tuple[Own, ...]] = {
    op: tuple(own for adapter in ADAPTERS for own in adapter.LOSSES.get(op, ())) for op in OPS
}


def _floor(op: str) -> Contender:
    """The matrix products alone, on the rows that need them, into memory that is there."""
    reference = op in PREFERENCES or op == "kl"

    def build(batch: Batch) -> Step:
        forward = batch.hidden[batch.kept]
        idle = op in ("grpo_groups", "sparse", "sparse_kept")
        backward = batch.hidden[batch.kept & (batch.advantages != 0)] if idle else forward
        logits = batch.hidden.new_empty(len(forward), len(batch.weight))
        grad_hidden, grad_weight = torch.empty_like(backward), torch.empty_like(batch.weight)

        def step() -> Result:
            if reference:
                torch.mm(forward, batch.weight.t(), out=logits)
            torch.mm(forward, batch.weight.t(), out=logits)
            if op != "score":
                grad_logits = logits[: len(backward)]
                torch.mm(grad_logits, batch.weight, out=grad_hidden)
                torch.mm(grad_logits.t(), backward, out=grad_weight)
            return Result()

        return step

    products = "1 product" if op == "score" else "4 products" if reference else "3 products"
    return Contender(f"bare GEMM, {products}", "floor", build)


def _copy(batch: Batch) -> Step:
    """Where logits are there, reading them and writing their gradient once is all that must be done."""
    assert batch.logits is not None
    logits, grad = batch.logits, torch.empty_like(batch.logits)

    def step() -> Result:
        grad.copy_(logits)
        return Result()

    return step


def _peer(name: str, build: Build, compiles: bool, gpu: bool) -> Contender:
    def where_it_runs(batch: Batch) -> Step:
        wants_gpu(batch.hidden)
        return build(batch)

    return Contender(name, "peer", where_it_runs if gpu else build, compiles, gpu)


def _training(op: str, peer: LogpPeer) -> Contender:
    """The op's loss over a peer's differentiable log-probabilities, forward and backward."""

    def build(batch: Batch) -> Step:
        large = peer.most_logits is not None and len(batch.targets) * len(batch.weight) > peer.most_logits
        if large and not batch.hidden.is_cuda:
            raise Skipped("it takes minutes at this size")
        logp_of = peer.load()
        rows, n = kept_rows(batch, op), len(batch.targets)
        whole, targets = len(rows) == n, batch.targets[rows]

        def logps(hidden: Tensor, weight: Tensor) -> Tensor:
            if whole:
                return logp_of(hidden, weight, targets)
            found = logp_of(hidden[rows], weight, targets).float()
            return torch.zeros(n, device=found.device).index_copy(0, rows, found)

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            ref_logp = None
            if batch.ref_hidden is not None and batch.ref_weight is not None:
                with torch.no_grad():
                    ref_logp = logps(batch.ref_hidden, batch.ref_weight)
            logp = logps(hidden, weight)
            return LOSSES[op](logp, ref_logp, batch), logp

        return training(batch, forward)

    return _peer(peer.name, build, peer.compiles, peer.gpu)


def _scoring(peer: LogpPeer) -> Contender:
    def build(batch: Batch) -> Step:
        score = peer.load_score()

        def step() -> Result:
            with torch.no_grad():
                logp, entropy = score(batch.hidden, batch.weight, batch.targets)
            return Result(logp=logp, entropy=entropy)

        return step

    return _peer(peer.name, build, peer.compiles, peer.gpu)


def contenders(op: str, max_bytes: int | None = None, backend: str | None = None) -> list[Contender]:
    """Everybody who can do this op on hidden states and a head; ``max_bytes`` and ``backend`` are ours."""
    found = [Contender("copy of the logits", "floor", _copy) if op == "logits" else _floor(op)]
    if op == "score":
        found += [_scoring(peer) for peer in LOGP_PEERS if peer.load_score is not unable]
    elif op in LOSSES:
        found += [_training(op, peer) for peer in LOGP_PEERS if op not in peer.leaves_out]
    found += [_peer(*own) for own in OWN_LOSSES.get(op, ())]
    return found + [Contender(name, "ours", build) for name, build in ours.contenders(op, max_bytes, backend)]


def without(found: Sequence[Contender], skipped: Sequence[str]) -> list[Contender]:
    return [c for c in found if not any(part and part in c.name for part in skipped)]
