"""Whose NaN or infinity it is that shows in the statistics of some rows.

To look through a whole head in every call would cost as much as reading it once more. A NaN in it shows in the
statistics of every row, and so does an infinity: in the mean of the logits, if in nothing else, which makes a CPU look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.types import Head, Reference, TokenStats

WANTS = "got NaN or infinity, wants finite numbers"


def _all_finite(x: Tensor | None, device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=device) if x is None else torch.isfinite(x).all()


def explain(stats: TokenStats, head: Head, reference: Reference | None, first: bool) -> None:
    """Raise for values that are not finite in a weight, a bias, ready logits or a reference.

    A bias of -inf, and a ready logit of -inf, is a token that cannot come next, which is fine. ``first``: no other rows
    of this call have been looked at.
    """
    device = stats.lse.device
    biases = _all_finite(head.bias, device)
    if reference is not None:
        biases = biases & _all_finite(reference.head.bias, device)
    facts = [(torch.isfinite(stats.lse).all(), "logits" if head.weight is None else "weight or bias")]
    if head.weight is not None and head.softcap is not None and first:  # which takes an infinity for a large logit
        facts.append((torch.isfinite(head.weight).all(), "weight"))
    if reference is not None and stats.kl is not None:
        facts.append((torch.isfinite(stats.kl).all() | ~biases, " or ".join(reference.names)))
    if device.type != "cuda":
        # The mean of finite logits around -3e38 may be infinite in float32, too: no fact, but a reason to look.
        mean = head.weight is None or stats.mean_logit is None or bool(torch.isfinite(stats.mean_logit).all())
        if not (mean and all(bool(fine) for fine, _ in facts)):
            _say_whose(stats, head, reference)
    check.hold([(fine, f"{name}: {WANTS}") for fine, name in facts])


def _say_whose(stats: TokenStats, head: Head, reference: Reference | None) -> None:
    named: list[tuple[str, Tensor | None]] = [("weight", head.weight), ("bias", head.bias)]
    if reference is not None:
        named += zip(reference.names, (reference.hidden, reference.head.weight), strict=True)
    for name, x in named:
        if x is not None and not bool(torch.isfinite(x).all()) and (name != "bias" or not _is_mask(x)):
            raise ValueError(f"{name}: {WANTS}")
    if head.weight is None:
        raise ValueError("logits: got NaN or infinity in a row that counts, wants finite numbers, or -inf")
    if not bool(torch.isfinite(stats.lse).all()):
        if head.bias is not None and not bool(torch.isfinite(head.bias).all()):  # -inf times a negative logit_scale
            raise ValueError(f"bias: {WANTS}")
        raise ValueError("hidden, weight: the logits overflow; wants logits that float32 can hold")


def _is_mask(bias: Tensor) -> bool:
    return not bool((torch.isnan(bias) | (bias == torch.inf)).any()) and bool(torch.isfinite(bias).any())
