"""The rows of a tile as csrc wants them: contiguous, wide, and alive for as long as their addresses are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels import _C
from rlhf_kernels.types import Grads, Head, Tile, TokenStats


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits and statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def strip_of(z: Tensor | None, first: int) -> _C.Strip:
    """Columns ``first`` and following, given as a [n, width] tensor."""
    return _C.Strip() if z is None else _C.Strip(z=z.data_ptr(), ld=z.stride(0), first=first, width=z.shape[1])


class Transform:
    """softcap(scale * (product + bias)) / temperature for n rows."""

    def __init__(self, head: Head, temperature: float | Tensor, n: int, dtype: torch.dtype):
        self._bias = None if head.bias is None else head.bias.to(dtype).contiguous()
        many = temperature if isinstance(temperature, Tensor) else torch.full((n,), temperature, dtype=torch.float64)
        self._temperature = many.to(dtype).contiguous()
        self.c = _C.Transform(
            bias=address(self._bias),
            temperature=address(self._temperature),
            scale=head.logit_scale,
            softcap=head.softcap or 0.0,
        )


@dataclass(frozen=True)
class Sums:
    """Softmax sums of n rows, in float64, and the logits of their targets: all that statistics are made of."""

    policy: Tensor  # [n, PARTIAL_DOUBLES]
    reference: Tensor | None
    forward_kl: bool
    target_z: Tensor  # [n, K]

    @staticmethod
    def start(tile: Tile) -> Sums:
        def none_yet() -> Tensor:
            x = torch.zeros(tile.hidden.shape[0], _C.PARTIAL_DOUBLES, dtype=torch.float64)
            x[:, 0] = -torch.inf  # the maximum
            return x

        ref = tile.reference
        target_z = torch.full(tile.targets.shape, torch.nan, dtype=wide(tile.hidden.dtype))
        return Sums(none_yet(), none_yet() if ref else None, ref is not None and ref.direction == "forward", target_z)

    def lse_ref(self) -> Tensor:
        """[n] float64 log-sum-exp of the reference's logits."""
        assert self.reference is not None
        most, ties, rest = self.reference[:, :3].unbind(1)
        return most + ((ties - 1) + rest).log1p()

    @property
    def c(self) -> _C.Sums:
        return _C.Sums(policy=address(self.policy), reference=address(self.reference), forward_kl=self.forward_kl)


class Rows:
    """What every kernel needs to know about the rows of a tile."""

    def __init__(self, tile: Tile):
        n, ref = tile.hidden.shape[0], tile.reference
        self.dtype = wide(tile.hidden.dtype)
        self.is_double = self.dtype == torch.float64
        self.vocab = tile.hidden.shape[1] if tile.head.weight is None else tile.head.weight.shape[0]
        self._ids = tile.targets.contiguous()
        self._transform = Transform(tile.head, tile.temperature, n, self.dtype)
        self._transform_ref = Transform(ref.head, tile.temperature, n, self.dtype) if ref else None
        self.transform = self._transform.c
        self.transform_ref = self._transform_ref.c if self._transform_ref else _C.Transform()

    def work(self, rows: int | None = None) -> _C.Work:
        rows = self._ids.shape[0] if rows is None else rows
        return _C.Work(rows=rows, vocab=self.vocab, threads=torch.get_num_threads())

    def targets(self, sums: Sums) -> _C.Targets:
        return _C.Targets(ids=address(self._ids), z=address(sums.target_z), count=self._ids.shape[1])

    def push(self, sums: Sums, z: Tensor, z_ref: Tensor | None, first: int) -> None:
        """Products [n, width] of columns ``first`` and following become logits in place, and join the sums."""
        _C.push(
            self.is_double, self.work(), strip_of(z, first), strip_of(z_ref, first), self.transform,
            self.transform_ref, self.targets(sums), sums.c,
        )  # fmt: skip

    def grad(
        self,
        sums: Sums,
        z: Tensor,
        z_ref: Tensor | None,
        first: int,
        upstream: Upstream,
        index: Tensor | None,
        out: Tensor,
    ) -> None:
        """d loss / d product into ``out`` [r, width]: columns ``first`` and following of the rows in ``index``."""
        _C.grad(
            self.is_double, self.work(out.shape[0]), address(index), strip_of(z, first), strip_of(z_ref, first),
            self.transform, self.targets(sums), sums.c, upstream.c, address(out), out.stride(0),
        )  # fmt: skip

    def statistics(self, sums: Sums) -> TokenStats:
        """Sums over the whole vocabulary to statistics."""
        n = self._ids.shape[0]
        logp = torch.empty_like(sums.target_z)
        columns = torch.empty(4 if sums.reference is None else 5, n, dtype=self.dtype)
        entropy, lse, mean_logit, top1 = columns[:4]
        kl = None if sums.reference is None else columns[4]
        _C.finish(
            self.is_double, self.work(), self.targets(sums), sums.c, address(logp), address(entropy), address(lse),
            address(mean_logit), address(top1), address(kl),
        )  # fmt: skip
        return TokenStats(logp, entropy, lse, mean_logit, top1, kl)


class Upstream:
    """d loss / d statistic, laid out for csrc."""

    def __init__(self, grads: Grads, dtype: torch.dtype):
        self._grads = [g.to(dtype).contiguous() for g in grads.filled()]
        self.c = _C.UpstreamGrads(*(g.data_ptr() for g in self._grads))
