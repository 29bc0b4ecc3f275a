"""Who is compared, each used as its own users would. One that is not installed says so when it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import ours, peers
from benchmarks.cases import Batch
from benchmarks.objectives import LOSSES
from benchmarks.truth import Result

Step = Callable[[], Any]  # one timed call


@dataclass(frozen=True)
class Contender:
    """``build`` imports and prepares what a user prepares once; the step it returns is what is timed."""

    name: str
    side: str  # "floor", "peer" or "ours"
    build: Callable[[Any], Step]  # raises ImportError where the peer is not installed, or Skipped
    compiles: bool = False  # its first call compiles for the shapes it meets


def _floor(op: str) -> Contender:
    """The matrix products alone, on the rows that need them, into memory that is there."""

    def build(batch: Batch) -> Step:
        forward = batch.hidden[batch.kept]
        alive = batch.kept & (batch.advantages != 0) if not op.startswith("dpo") else batch.kept
        backward = batch.hidden[alive]
        logits = batch.hidden.new_empty(len(forward), len(batch.weight))
        grad_hidden, grad_weight = torch.empty_like(backward), torch.empty_like(batch.weight)

        def step() -> Result:
            if op.startswith("dpo"):
                torch.mm(forward, batch.weight.t(), out=logits)  # the reference
            torch.mm(forward, batch.weight.t(), out=logits)
            if op != "score":
                grad_logits = logits[: len(backward)]
                torch.mm(grad_logits, batch.weight, out=grad_hidden)
                torch.mm(grad_logits.t(), backward, out=grad_weight)
            return Result()

        return step

    products = {"score": "1 product", "dpo": "4 products", "dpo_prompts": "4 products"}.get(op, "3 products")
    return Contender(f"bare GEMM, {products}", "floor", build)


def _training(op: str, peer: peers.LogpPeer) -> Contender:
    """The op's loss over a peer's differentiable log-probabilities, forward and backward."""

    def build(batch: Batch) -> Step:
        if peer.most_logits is not None and len(batch.targets) * len(batch.weight) > peer.most_logits:
            raise peers.Skipped("it takes minutes at this size")
        logp_of = peer.load()
        hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
        rows = batch.kept.nonzero().squeeze(1)
        targets = batch.targets[rows] if op == "sparse_kept" else batch.targets

        def step() -> Result:
            ref_logp = None
            if batch.ref_hidden is not None and batch.ref_weight is not None:
                with torch.no_grad():
                    ref_logp = logp_of(batch.ref_hidden, batch.ref_weight, targets)
            if op == "sparse_kept":
                found = logp_of(hidden[rows], weight, targets)
                logp = torch.zeros(len(batch.targets)).index_copy(0, rows, found.float())
            else:
                logp = logp_of(hidden, weight, targets)
            loss = LOSSES[op](logp, ref_logp, batch)
            return Result(loss, logp, None, *torch.autograd.grad(loss, (hidden, weight)))

        return step

    return Contender(peer.name, "peer", build, peer.compiles)


def _scoring(peer: peers.LogpPeer) -> Contender:
    def build(batch: Batch) -> Step:
        score = peer.load_score()

        def step() -> Result:
            with torch.no_grad():
                logp, entropy = score(batch.hidden, batch.weight, batch.targets)
            return Result(logp=logp, entropy=entropy)

        return step

    return Contender(peer.name, "peer", build, peer.compiles)


def contenders(op: str, max_bytes: int | None = None) -> list[Contender]:
    """Everybody who can do this op on hidden states and a head; ``max_bytes`` is our byte budget."""
    found = [_floor(op)]
    if op == "score":
        found += [_scoring(peer) for peer in peers.LOGP_PEERS if peer.load_score is not peers.unable]
    else:
        found += [_training(op, peer) for peer in peers.LOGP_PEERS if op in peer.ops]
    found += [Contender(name, "peer", build, compiles) for name, build, compiles in peers.OWN_LOSSES.get(op, ())]
    return found + [Contender(name, "ours", build) for name, build in ours.contenders(op, max_bytes)]


def without(found: Sequence[Contender], skipped: Sequence[str]) -> list[Contender]:
    return [c for c in found if not any(part and part in c.name for part in skipped)]
