"""What contenders are made of.

Legend: N tokens, K kept of them, H hidden, V vocabulary, S sequences, T tokens of the longest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.work.cases import COMPACTED, Batch
from benchmarks.work.truth import Result

Step = Callable[[], Any]  # one timed call
Build = Callable[[Batch], Step]
LogpOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, targets) -> logp, differentiable
ScoreOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # -> logp, entropy
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (hidden, weight) -> loss, logp or None


class Skipped(Exception):
    """A contender that is there and yet does not enter; the message says why."""


def brief(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    text = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text.strip()[:300]}"


def unable() -> Any:
    raise Skipped("it has no such output")


@dataclass(frozen=True)
class LogpPeer:
    """Somebody whose log-probabilities can be differentiated: every loss can be built on them."""

    name: str
    load: Callable[[], LogpOf]
    load_score: Callable[[], ScoreOf] = unable
    compiles: bool = False
    most_logits: int | None = None  # not run on batches of more logits on a CPU
    gpu: bool = False  # its kernels run on a GPU, or in Triton's interpreter
    leaves_out: tuple[str, ...] = ()  # ops that it enters with something better


@dataclass(frozen=True)
class Contender:
    """``build`` imports and prepares what a user prepares once; the step it returns is what is timed."""

    name: str
    side: str  # "floor", "peer" or "ours"
    build: Callable[[Any], Step]  # raises ImportError where the peer is not installed, or Skipped
    compiles: bool = False  # its first call compiles for the shapes it meets
    gpu: bool = False  # its kernels run on a GPU, or in Triton's interpreter


class Own(NamedTuple):
    """A peer's own form of one op."""

    name: str
    build: Build
    compiles: bool = False
    gpu: bool = False  # as of a LogpPeer


def wants_gpu(x: Tensor) -> None:
    """
    Raises:
        Skipped: this peer's kernels could not run here.
    """
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("needs a GPU, or TRITON_INTERPRET=1 at a tiny shape")


def mark(cuda: bool) -> Any:
    """A moment on the device's clock."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one mark to the next, both reached."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def training(batch: Batch, forward: Forward, *, outputs: Callable[[], dict[str, Any]] = dict) -> Step:
    """Forward and backward of a loss of the hidden states and the head.

    Args:
        batch: whose head is differentiated.
        forward: its result is what the gradients are of.
        outputs: further fields of the result, asked for when all is done.
    """
    leaves = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    cuda = batch.hidden.is_cuda

    def step() -> Result:
        start = mark(cuda)
        loss, logp = forward(*leaves)
        middle = mark(cuda)
        gradients = torch.autograd.grad(loss, leaves)
        return Result(loss, logp, None, *gradients, forward_s=lambda: between(start, middle), **outputs())

    return step


def kept_rows(batch: Batch, op: str) -> Tensor:
    """[K] the rows that a peer is given in this op."""
    kept = batch.kept if op in COMPACTED or op == "kl" else torch.ones_like(batch.kept)
    return kept.nonzero().squeeze(1)


def mean_nll(load: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Build:
    """SFT with a peer's cross-entropy: (hidden, weight, targets) -> mean over the rows given."""

    def build(batch: Batch) -> Step:
        loss_of, rows = load(), kept_rows(batch, "sft")
        targets = batch.targets[rows]
        return training(batch, lambda hidden, weight: (loss_of(hidden[rows], weight, targets), None))

    return build


def mean_kl(load: Callable[[], Callable[..., Tensor]]) -> Build:
    """The mean exact KL with a peer's (hidden, weight, ref_hidden, ref_weight) -> [K] in nats."""

    def build(batch: Batch) -> Step:
        assert batch.ref_hidden is not None
        kl_of, rows, seen = load(), kept_rows(batch, "kl"), []
        ref_rows = batch.ref_hidden[rows]

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
            kl = kl_of(hidden[rows], weight, ref_rows, batch.ref_weight)
            seen[:] = [kl.detach()]
            return kl.mean(), None

        return training(batch, forward, outputs=lambda: {"kl": seen.pop()})

    return build


class Padding:
    """Sequences side by side in [S, T], for peers that know no packed ones."""

    def __init__(self, batch: Batch, op: str, order: Tensor | None = None) -> None:
        self.sequences = batch.cu_seqlens.numel() - 1
        self.rows = kept_rows(batch, op)
        place = torch.arange(self.sequences, device=batch.hidden.device)
        if order is not None:
            place = place.scatter(0, order.to(place.device), place)
        segments = batch.segments[self.rows]
        counts = segments.bincount(minlength=self.sequences)
        starts = counts.cumsum(0) - counts
        self.tokens = int(counts.max())
        self.slots = place[segments] * self.tokens + torch.arange(len(segments), device=place.device) - starts[segments]

    def __call__(self, x: Tensor, fill: float = 0) -> Tensor:
        """[N, ...] -> [S, T, ...], differentiable."""
        empty = x.new_full((self.sequences * self.tokens, *x.shape[1:]), fill)
        return empty.index_copy(0, self.slots, x[self.rows]).view(self.sequences, self.tokens, *x.shape[1:])


def chosen_first(batch: Batch) -> Tensor:
    """[S] the order of sequences in which all chosen replies precede all rejected ones."""
    s = batch.cu_seqlens.numel() - 1
    return torch.arange(s).view(-1, 2).t().flatten()
