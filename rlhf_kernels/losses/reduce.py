"""From one number per token to one number per batch: reductions and their denominators.

A denominator is known before the first token is scored, so losses can be summed over chunks, micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.checks import (
    cu_seqlens_of,
    float_tensor,
    holds,
    is_finite,
    one_of,
    plain,
    target_arguments,
    tensor,
    wants,
)
from rlhf_kernels.checks import ignore_index as check_ignore_index
from rlhf_kernels.segments import segment_sum, spread

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")
Count = int | float | Tensor


def kept_targets(hidden: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """[...] bool, true where there is something to learn from."""
    float_tensor("hidden", hidden)
    wants(hidden.dim() > 0, "hidden", hidden, "[..., H]")
    check_ignore_index(ignore_index)
    target_arguments(hidden, targets, 0)
    return targets != ignore_index


def denominator(
    name: str, given: Count | None, count: Callable[[], Tensor], device: torch.device, checks: bool = True
) -> Tensor:
    """0-d float64: what the caller gave, else what ``count`` says; infinity stands for zero.

    Nothing to divide by means nothing to learn from, and x / inf is a zero with a zero gradient where x / 0 is a NaN.
    A NaN of a broken all-reduce stays one: as a zero loss it would end the learning unseen.
    """
    if given is None:
        value = count().detach()
    elif isinstance(given, Tensor):
        tensor(name, given)
        number = given.dim() == 0 and not given.is_complex() and given.dtype != torch.bool
        wants(number, name, given, "a number or a 0-d tensor")
        value = given.detach()
    else:
        number = plain(given)
        wants(is_finite(number) and number >= 0, name, given, "a finite number, zero or more")
        value = torch.full((), number, dtype=torch.float64, device=device)
    value = value.to(device=device, dtype=torch.float64)
    if checks and isinstance(given, Tensor):
        seen = "" if value.is_cuda else f" got {value.item()},"
        holds(torch.isfinite(value) & (value >= 0), f"{name}:{seen} wants a finite number, zero or more")
    return value.masked_fill(value == 0, math.inf)


def total(x: Tensor, over: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of ``weight * x`` over a denominator, in the dtype of ``x``."""
    return (x if weight is None else weight.to(x.dtype) * x).sum() / over.to(x.dtype)


def metric(x: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of a detached metric; ``where`` selects its units."""
    x = x.detach().float() if not x.is_floating_point() else x.detach()
    if where is None:
        return x.sum(), x.new_full((), x.numel())
    return x.where(where, 0.0).sum(), where.sum().to(x.dtype)


def averages(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Sums over counts, zero where nothing was counted: for losses that never meet the head."""
    return {name: x / n.clamp(min=1) for name, (x, n) in metrics.items()}


def kept_lengths(kept: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] float64 number of kept rows of each sequence."""
    return segment_sum(kept.reshape(-1).double(), cu_seqlens)


class TokenReduction(NamedTuple):
    """A loss is ``(weight * x).sum() / over`` for the kept rows' values x."""

    weight: Tensor | None  # [N], None is all ones
    over: Tensor  # 0-d


def token_reduction(
    reduction: str,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    num_tokens: Count | None,
    num_sequences: Count | None,
    checks: bool = True,
) -> TokenReduction:
    """Turn a reduction into per-token weights and a denominator, so that the loss itself stays per token.

    ``token_mean`` divides the sum over tokens by ``num_tokens``; ``sequence_sum`` divides the same sum by
    ``num_sequences``; ``sequence_mean`` first averages over each sequence's kept tokens. Sequences without kept tokens
    are in neither numerator nor denominator.

    Args:
        reduction: one of the three above.
        kept: [N] bool, true where the target is not ignored.
        cu_seqlens: [S+1] boundaries; needed by ``sequence_mean``, and by ``sequence_sum`` without ``num_sequences``.
        num_tokens: global number of tokens; those kept here if None.
        num_sequences: global number of sequences; those here with a kept token if None.
        checks: look at boundaries and denominators.
    """
    one_of("reduction", reduction, REDUCTIONS)
    device, rows = kept.device, kept.numel()
    if reduction == "token_mean":
        return TokenReduction(None, denominator("num_tokens", num_tokens, kept.sum, device, checks))
    if cu_seqlens is None:
        needed = reduction == "sequence_mean" or num_sequences is None
        wants(not needed, "cu_seqlens", None, f"sequence boundaries [S+1] for reduction={reduction!r}")
        return TokenReduction(None, denominator("num_sequences", num_sequences, kept.sum, device, checks))
    cu = cu_seqlens_of("cu_seqlens", cu_seqlens, rows, device, checks)
    lengths = kept_lengths(kept, cu)
    over = denominator("num_sequences", num_sequences, (lengths > 0).sum, device, checks)
    if reduction == "sequence_sum":
        return TokenReduction(None, over)
    weight = spread(lengths.clamp(min=1).reciprocal(), cu, rows)
    return TokenReduction(weight.reshape(kept.shape), over)
