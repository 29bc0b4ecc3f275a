"""The nouns of the house.

Shapes everywhere: N packed tokens, H hidden, V vocabulary, S sequences, K ids asked for per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What a policy says about each token; a loss may look at nothing else.

    Float32 (float64 for float64 inputs), zero where the target is ignored. ``kl`` is None unless a reference was given.
    """

    logp: Tensor  # [N] log-probability of the target token
    entropy: Tensor  # [N] entropy of the next-token distribution, in nats
    lse: Tensor  # [N] log-sum-exp of the logits
    mean_logit: Tensor | None = None  # [N] mean of the logits over the vocabulary
    top1: Tensor | None = None  # [N] one where no logit exceeds the target's, else zero; no gradient
    kl: Tensor | None = None  # [N] exact KL between policy and reference, in nats

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenStats:
        """The same statistics with ``change`` applied to every one that is there."""
        return TokenStats(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]


class LossOutput(NamedTuple):
    """A differentiable scalar and what to log beside it."""

    loss: Tensor  # []
    metrics: dict[str, Tensor]  # detached scalars, named as in the glossary


class HeadOptions(TypedDict, total=False):
    """Options of the linear head, shared by every public function that meets it.

    The logits are ``softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, in that order.
    """

    bias: Tensor | None  # [V]
    temperature: float | Tensor  # positive; a number, or one per token, shaped like targets
    softcap: float | None  # logits become softcap * tanh(logits / softcap)
    logit_scale: float
    vocab_size: int | None  # columns of a padded weight beyond it do not exist
    ignore_index: int
    backend: str  # "auto", "eager", "native" or "triton"
    max_bytes: int | None  # most scratch and stash, in bytes, whatever the number of tokens
    weight_grad: Tensor | None  # [V, H] float32: the head's gradient is added here and weight.grad stays None
    loss_scale: float  # with weight_grad: the factor that the loss will be multiplied by before backward
    tolerance: float | None  # share (L2) of their gradient that logits may lose; None: nothing is left out
    tp_group: Any  # torch.distributed.ProcessGroup whose ranks hold the rows of weight, in order; None: all are here
    max_targets: int | None  # at least the targets that are not ignored: then no call waits for the GPU to count them
    checks: bool  # look into the data: targets in range, and nothing NaN or infinite where it counts


@dataclass(frozen=True, eq=False)
class Head:
    """Everything that turns hidden states into logits, but the temperature. One object per call: scratch may live as
    long as it does.
    """

    weight: Tensor | None  # [V, H]; None: the hidden states are logits already
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Reference:
    """The same rows under a frozen head, for the exact KL. It shares the policy's temperature."""

    hidden: Tensor  # [n, H']
    head: Head  # of the same vocabulary
    direction: str = "reverse"  # "reverse" is KL(policy | reference), "forward" KL(reference | policy)
    names: tuple[str, str] = ("ref[0]", "ref[1]")  # Errors call hidden and weight by these names.


@dataclass(frozen=True)
class Tile:
    """A few rows on their way through the head; none of them is ignored."""

    hidden: Tensor  # [n, H], rows contiguous
    head: Head
    targets: Tensor  # [n, K] int64, each a column of the head
    temperature: float | Tensor  # a number or [n] float32
    reference: Reference | None = None


class Grads(NamedTuple):
    """d loss / d statistic for the rows of a tile, in the dtype of the statistics. None is zero, known beforehand."""

    logp: Tensor  # [n, K]
    entropy: Tensor | None = None  # [n]
    lse: Tensor | None = None  # [n]
    mean_logit: Tensor | None = None  # [n]
    kl: Tensor | None = None  # [n]

    def each(self, change: Callable[[Tensor], Tensor]) -> Grads:
        """The same gradients with ``change`` applied to every one that is there."""
        return Grads(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    def filled(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All five, zeros where there were none."""
        zero = self.logp.new_zeros(self.logp.shape[0])
        logp, *rest = self
        return (logp, *(zero if x is None else x for x in rest))  # type: ignore[return-value]


class Sinks(NamedTuple):
    """Where a backend leaves its gradients. None: nobody wants it, skip that product.

    ``weight`` and ``bias`` are added to. Where they are ``fresh`` they hold nothing yet, not even zeros, and every
    element is overwritten; only then may ``weight`` be bfloat16, for a bfloat16 head: sums of float32, rounded once.
    """

    hidden: Tensor | None  # [r, H] hidden's dtype, float32 for float16: overwritten, one row per row asked for
    weight: Tensor | None  # [V, H] float32 (float64 for float64 inputs)
    bias: Tensor | None  # [V] float32 (float64 for float64 inputs)
    fresh: bool = False


class Entries(NamedTuple):
    """What is left of the gradients of some rows' logits where a tolerance allows to leave out the rest."""

    rows: Tensor  # [s] int64 rows of the tile; those neither here nor in ``others`` keep nothing
    others: Tensor  # [o] int64 rows of the tile that keep everything
    lost: Tensor  # float64 squared norm of what was left out (at least), of each row that was judged, in no order
    norm: Tensor  # float64 squared norm of everything (at most), of the same
    kept: Any  # the backend's own business

    def with_unseen(self, whole: Tensor, lost: Tensor, norm: Tensor) -> Entries:
        """With more rows that keep everything, and what rows lose that nobody has looked at."""
        others = torch.cat([self.others, whole]).sort().values
        return self._replace(others=others, lost=torch.cat([self.lost, lost]), norm=torch.cat([self.norm, norm]))


class Backend(Protocol):
    """Functions on one tile of rows. The residual is the backend's own business.

    In the statistics of a tile ``logp`` is [n, K]; everything else is [n].
    """

    def residual_bytes(self, tile: Tile) -> int:
        """Bytes of residual and scratch that ``forward`` needs per row."""
        ...

    def score(self, tile: Tile) -> TokenStats:
        """Statistics only; scratch stays below 64 KiB per row whatever V."""
        ...

    def forward(self, tile: Tile) -> tuple[TokenStats, Any]:
        """Statistics, and what ``backward`` needs."""
        ...

    def backward(
        self, tile: Tile, residual: Any, stats: TokenStats, grads: Grads, rows: Tensor | None, sinks: Sinks
    ) -> None:
        """Gradients of the rows given by ``rows`` ([r] ascending int64; None is all). Consumes the residual."""
        ...


class SparseBackend(Backend, Protocol):
    """One that can leave out what a tolerance allows."""

    def entries_bytes(self, tile: Tile) -> int:
        """Bytes per row that ``select`` and ``multiply`` need beside the residual."""
        ...

    def select(
        self, tile: Tile, residual: Any, stats: TokenStats, grads: Grads, rows: Tensor | None, tolerance: float
    ) -> Entries:
        """What is left of each row; ``backward`` of the other rows, if there are any, comes after."""
        ...

    def multiply(self, tile: Tile, entries: Entries, sinks: Sinks) -> None:
        """``backward`` of the rows of these entries. A bfloat16 weight may then be added to."""
        ...


Objective = Callable[..., tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]
"""``objective(stats, cu_seqlens, *per_token, *per_sequence) -> (scalar, {name: (sum, count)})``.

It sees kept rows only: ``cu_seqlens`` counts kept rows, and sequences without any have length zero.
The scalar must be additive over units (tokens, sequences or pairs): denominators are known beforehand.
"""
