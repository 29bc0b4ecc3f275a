"""Any backend on a head whose rows are spread over ranks: the weight is never gathered, and no engine knows.

Statistics of the whole are a function of the statistics of its parts, a few numbers per token and rank: with lse_r,
entropy_r and mean_r those of part r, w_r = exp(lse_r - lse) its share of the mass and V_r its columns,

    lse = log sum_r exp lse_r      entropy = sum_r w_r (entropy_r + lse - lse_r)      mean_logit = sum_r V_r mean_r / V

and the target's log-probability is its part's, moved by lse_r - lse. The parts are exchanged once, going forward; the
gradient goes through the same function back to this rank's part, and from there the backend knows the way. Ranks meet
once more for the sum of their gradients of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.types import Backend, Grads, Sinks, Tile, TokenStats


class Residual(NamedTuple):
    inner: Any  # of the backend
    own: TokenStats  # of this rank's part
    parts: Tensor  # [R, n, 3 + K] lse, entropy, mean_logit and logp of every part


@dataclass(frozen=True)
class VocabParallel:
    """The part of a head that one rank holds: ``columns`` of ``vocab``, from ``rank * stride`` on."""

    backend: Backend
    group: Any  # torch.distributed.ProcessGroup
    stride: int  # columns of every part but the last
    vocab: int  # of all parts

    @staticmethod
    def of(backend: Backend, group: Any, width: int, vocab: int | None) -> VocabParallel:
        """Where this rank's weight has ``width`` rows, and all of them ``vocab`` together, if that is known."""
        ranks = dist.get_world_size(group)
        vocab = width * ranks if vocab is None else vocab
        return VocabParallel(backend, group, -(-vocab // ranks), vocab)

    @property
    def start(self) -> int:
        """First column of this rank."""
        return dist.get_rank(self.group) * self.stride

    @property
    def columns(self) -> int:
        """How many columns this rank has."""
        return min(self.stride, self.vocab - self.start)

    @property
    def everyone(self) -> bool:
        """Whether every rank has at least one column."""
        return self.vocab > (dist.get_world_size(self.group) - 1) * self.stride

    def same(self, *facts: int, device: torch.device) -> Tensor:
        """[] bool: all ranks say the same of a call, without which they would wait for each other for ever."""
        mine = torch.tensor([self.stride, self.vocab, *facts], device=device)
        ends = torch.stack([mine, -mine])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        return (ends[0] == -ends[1]).all()

    def residual_bytes(self, tile: Tile) -> int:
        """As of the largest part, for all ranks must cut their rows alike."""
        if tile.head.weight is None:
            return self.backend.residual_bytes(replace(tile, hidden=tile.hidden.new_empty(0, self.stride)))
        largest = tile.head.weight[:1].expand(self.stride, -1)
        return self.backend.residual_bytes(replace(tile, head=replace(tile.head, weight=largest)))

    def score(self, tile: Tile) -> TokenStats:
        own = self.backend.score(self._here(tile))
        return self._told(self._exchanged(own), tile.targets, own.lse.dtype)

    def forward(self, tile: Tile) -> tuple[TokenStats, Residual]:
        own, inner = self.backend.forward(self._here(tile))
        parts = self._exchanged(own)
        return self._told(parts, tile.targets, own.lse.dtype), Residual(inner, own, parts)

    def backward(
        self, tile: Tile, residual: Residual, stats: TokenStats, grads: Grads, rows: Tensor | None, sinks: Sinks
    ) -> None:
        here, own = self._back(residual.parts, tile.targets, grads), residual.own
        self.backend.backward(self._here(tile), residual.inner, own, here, rows, sinks)
        if sinks.hidden is not None and tile.head.weight is not None:
            dist.all_reduce(sinks.hidden, group=self.group)

    def _here(self, tile: Tile) -> Tile:
        """The tile as this rank's backend sees it; targets of other ranks become any column."""
        return replace(tile, targets=torch.where(self._mine(tile.targets), tile.targets - self.start, 0))

    def _mine(self, targets: Tensor) -> Tensor:
        return (targets >= self.start) & (targets < self.start + self.columns)

    def _exchanged(self, own: TokenStats) -> Tensor:
        assert own.mean_logit is not None
        mine = torch.cat([torch.stack([own.lse, own.entropy, own.mean_logit], 1), own.logp], 1)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return torch.stack(parts)

    def _told(self, parts: Tensor, targets: Tensor, dtype: torch.dtype) -> TokenStats:
        found = self._whole(parts.double(), targets).each(lambda x: x.to(dtype))
        return found._replace(logp=found.logp.clamp(max=0.0))

    def _whole(self, parts: Tensor, targets: Tensor) -> TokenStats:
        """Statistics of all columns, differentiable. Whether the target is the largest, the parts cannot tell."""
        lse_of, entropy_of, mean_of, logp_of = parts.split([1, 1, 1, targets.shape[1]], 2)
        lse = lse_of.logsumexp(0)
        ahead = lse - lse_of  # [R, n, 1]
        entropy = ((-ahead).exp() * (entropy_of + ahead)).sum(0)
        counts = [min(self.stride, self.vocab - r * self.stride) / self.vocab for r in range(len(parts))]
        mean = (mean_of * mean_of.new_tensor(counts)[:, None, None]).sum(0)
        logp = (logp_of - ahead).gather(0, (targets // self.stride)[None])[0]
        return TokenStats(logp, entropy[:, 0], lse[:, 0], mean[:, 0])

    def _back(self, parts: Tensor, targets: Tensor, grads: Grads) -> Grads:
        """Gradients with respect to the statistics of this rank's part."""
        with torch.enable_grad():
            leaf = parts.detach().double().requires_grad_()
            whole = self._whole(leaf, targets)
        # the first four of both are the same four
        asked = [(x, g.double()) for x, g in zip(whole[:4], grads[:4], strict=True) if x is not None and g is not None]
        (found,) = torch.autograd.grad([x for x, _ in asked], leaf, [g for _, g in asked])
        mine = found[dist.get_rank(self.group)].to(parts.dtype)
        return Grads(
            logp=mine[:, 3:].contiguous(),
            lse=mine[:, 0].contiguous(),
            entropy=None if grads.entropy is None else mine[:, 1].contiguous(),
            mean_logit=None if grads.mean_logit is None else mine[:, 2].contiguous(),
        )
