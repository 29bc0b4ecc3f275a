"""Matrix products into float32. On a GPU halves are multiplied as they are; elsewhere they are widened first."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]
    return torch.mm(a.float(), b.float(), out=out)


def leave_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a @ b in float32, in one pass over it; where ``fresh``, total = a @ b, rounded to its dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        if fresh and total.dtype != torch.float32:
            total.copy_(a.float() @ b.float())
        else:
            total.addmm_(a.float(), b.float(), beta=0 if fresh else 1)
    elif fresh:
        if total.dtype == a.dtype:
            torch.mm(a, b, out=total)
        else:
            product(a, b, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
