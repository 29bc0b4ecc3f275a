"""Whose NaN or infinity it is that shows in the statistics of some rows.

To look through a head in every call would cost as much as reading it once more. A NaN in it shows in the statistics of
every row. An infinity may only show in the mean of the logits, which is then a reason to look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.types import Head, Reference, TokenStats

WANTS = "got NaN or infinity, wants finite numbers"


def explain(stats: TokenStats, head: Head, reference: Reference | None, first: bool) -> None:
    """Raise for values that are not finite in a weight, a bias, ready logits or a reference.

    A bias of -inf, and a ready logit of -inf, is a token that cannot come next, which is fine. ``first``: no other rows
    of this call have been looked at.
    """
    facts = [(torch.isfinite(stats.lse).all(), "logits" if head.weight is None else "weight or bias")]
    if head.weight is not None and head.softcap is not None and first:  # A softcap makes a finite logit of an infinity.
        facts.append((torch.isfinite(check.row_sums(head.weight)).all(), "weight"))
    if reference is not None and stats.kl is not None:
        fine = torch.isfinite(stats.kl).all() | ~_biases_are_finite(head, reference)
        facts.append((fine, " or ".join(reference.names)))
    if stats.lse.is_cuda:
        check.hold([(fine, f"{name}: {WANTS}") for fine, name in facts])
    elif not (all(bool(fine) for fine, _ in facts) and _mean_is_finite(stats, head)):
        _say_whose(stats, head, reference)


def _say_whose(stats: TokenStats, head: Head, reference: Reference | None) -> None:
    """Raise if there is somebody to name. Nobody is where only the mean of finite logits has overflowed."""
    named: list[tuple[str, Tensor | None]] = [("weight", head.weight)]
    if reference is not None:
        named += zip(reference.names, (reference.hidden, reference.head.weight), strict=True)
    for name, x in named:
        if x is not None and not all(bool(torch.isfinite(part).all()) for part in check.chunks(x)):
            raise ValueError(f"{name}: {WANTS}")
    if head.bias is not None and bool((torch.isnan(head.bias) | (head.bias == torch.inf)).any()):
        raise ValueError(f"bias: {WANTS}")
    if bool(torch.isfinite(stats.lse).all()):
        return
    if head.weight is None:
        raise ValueError("logits: got NaN or infinity in a row that counts, wants finite numbers, or -inf")
    if head.bias is not None and not bool(torch.isfinite(head.bias).all()):
        raise ValueError("bias: got -inf in every column, or beside a negative logit_scale, wants finite numbers")
    raise ValueError("hidden, weight: the logits overflow; wants logits that float32 can hold")


def _mean_is_finite(stats: TokenStats, head: Head) -> bool:
    """Ready logits and masks of -inf in a bias may make it infinite."""
    if head.weight is None or stats.mean_logit is None:
        return True
    masked = head.bias is not None and not bool(torch.isfinite(head.bias).all())
    return masked or bool(torch.isfinite(stats.mean_logit).all())


def _biases_are_finite(head: Head, reference: Reference) -> Tensor:
    """0-d bool. A token that only one of two heads can say makes the KL between them infinite, which is right."""
    fine = torch.ones((), dtype=torch.bool, device=reference.hidden.device)
    for bias in (head.bias, reference.head.bias):
        if bias is not None:
            fine = fine & torch.isfinite(bias).all()
    return fine
