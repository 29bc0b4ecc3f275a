"""Whose NaN or infinity it is that shows in the statistics of some rows, or in their gradients.

To look through a head in every call would cost as much as reading it once more. A NaN in it shows in the statistics of
every row; an infinity shows in the mean of the logits, or it is a logit's limit (a token that cannot come next, or one
at its softcap), and shows in the gradient of the hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.types import Head, Tile, TokenStats

WANTS = "got NaN or infinity, wants finite numbers"
MASK = 1e30  # A bias beyond it, mostly -inf or the least number of its dtype, stands for a token that cannot come next.


def explain(stats: TokenStats, tile: Tile) -> None:
    """Raise for values that are not finite in a weight, a bias, ready logits or a reference.

    A bias of -inf, and a ready logit of -inf, is a token that cannot come next, which is fine.
    """
    head, reference = tile.head, tile.reference
    facts = [(torch.isfinite(stats.lse).all(), "logits" if head.weight is None else "weight or bias")]
    if reference is not None and stats.kl is not None:
        # A token that only one of two heads can say makes the KL between them infinite, which is right; a NaN is not.
        masked = _masks(head) | _masks(reference.head)
        fine = torch.isfinite(stats.kl) | (masked & (stats.kl == torch.inf))
        facts.append((fine.all(), " or ".join(reference.names)))
    if stats.lse.is_cuda:
        check.hold([(fine, f"{name}: {WANTS}") for fine, name in facts])
    elif not (all(bool(fine) for fine, _ in facts) and _mean_is_finite(stats, head)):
        _say_whose(stats, tile)


def explain_gradient(hidden: Tensor, head: Head) -> None:
    """The same for the gradient [r, H] of hidden states, where zero times an infinity of the weight is a NaN."""
    if head.weight is None or hidden.is_cuda or bool(check.rows_are_finite(hidden).all()):
        return
    if not _is_finite(head.weight):
        raise ValueError(f"weight: {WANTS}")


def _say_whose(stats: TokenStats, tile: Tile) -> None:
    """Raise if there is somebody to name. Nobody is where only the mean of finite logits has overflowed."""
    head, reference = tile.head, tile.reference
    named: list[tuple[str, Tensor | None]] = [("weight", head.weight)]
    if reference is not None:
        named += zip(reference.names, (reference.hidden, reference.head.weight), strict=True)
    for name, x in named:
        if x is not None and not _is_finite(x):
            raise ValueError(f"{name}: {WANTS}")
    for name, bias in (("bias", head.bias), ("ref_head: bias", reference and reference.head.bias)):
        if bias is not None and bool((torch.isnan(bias) | (bias == torch.inf)).any()):
            raise ValueError(f"{name}: {WANTS}")
    if not bool(torch.isfinite(stats.lse).all()):
        if head.weight is None:
            raise ValueError("logits: got NaN or infinity in a row that counts, wants finite numbers, or -inf")
        if head.bias is not None and not bool(torch.isfinite(head.bias).all()):
            raise ValueError("bias: got -inf in every column, or beside a negative logit_scale, wants finite numbers")
        raise ValueError("hidden, weight: the logits overflow; wants logits that float32 can hold")
    if reference is not None and stats.kl is not None and not bool(torch.isfinite(stats.kl).all()):
        raise ValueError(f"{', '.join(reference.names)}: the logits overflow; wants logits that float32 can hold")


def _is_finite(x: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in check.chunks(x))


def _mean_is_finite(stats: TokenStats, head: Head) -> bool:
    """Ready logits and masks in a bias may make it infinite."""
    if head.weight is None or stats.mean_logit is None:
        return True
    return bool(torch.isfinite(stats.mean_logit).all()) or bool(_masks(head))


def _masks(head: Head) -> Tensor:
    """0-d bool: whether the bias says of some tokens that they cannot come next."""
    if head.bias is None:
        return torch.zeros((), dtype=torch.bool, device=None if head.weight is None else head.weight.device)
    return (head.bias.float() < -MASK).any()  # In float16 the bound itself would be -inf.
