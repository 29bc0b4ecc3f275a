"""Under DDP, FSDP2 and ZeRO: the loss belongs into the forward of the module that the engine has wrapped.

An engine gathers parameters, and reduces their gradients, around the forward of what it wraps. A head that is read
outside of it is a shard, or its gradient stays on its rank. So the call of the loss moves inside:

    module = InForward(model, step)          # step(model, batch) -> LossOutput
    fully_shard(module)                      # or DistributedDataParallel(module)
    out = module(batch)
    (out.loss * world_size).backward()       # engines average gradients over ranks; the denominators are global

Read weights there through their modules (``model.lm_head.weight``): that is what makes DeepSpeed gather them.

Ranks may have sequences of different lengths, and none to learn from at all: a loss of ignored targets alone is zero,
with gradients of zero, so that everybody takes part in what the engine does.

A head spread over ranks by rows (tensor parallelism) stays spread: that is ``tp_group=`` of every loss and statistic.
``gathered`` brings the hidden states together where they are spread by tokens (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class InForward(nn.Module):
    """A model, and what is computed from it, as one forward.

    Args:
        model: whose parameters these are.
        compute: ``compute(model, *args, **kwargs)``, which may read any weight of the model and call any loss.

    >>> head = torch.nn.Linear(4, 8, bias=False)
    >>> step = InForward(head, lambda head, x, targets: rk.sft_loss(x, head.weight, targets))
    >>> step(torch.zeros(2, 4), torch.tensor([1, 2])).loss.item() == torch.tensor(8.0).log()
    tensor(True)
    """

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.model, *args, **kwargs)


def summed(*counts: int | Tensor, group: Any = None) -> list[int]:
    """Denominators of a step: each count, summed over the ranks.

    Args:
        *counts: of this rank, such as its targets that are not ignored, its sequences, its pairs.
        group: whose ranks work on one step; None is all of them. Without torch.distributed the counts are returned.

    Returns:
        What ``num_tokens``, ``num_sequences`` or ``num_pairs`` should be on every rank.

    >>> summed(torch.tensor([3, -100, 5]).ne(-100).sum(), 2)
    [2, 2]
    """
    mine = torch.tensor([int(c) for c in counts], dtype=torch.int64)
    if dist.is_available() and dist.is_initialized():
        mine = mine.to("cuda") if dist.get_backend(group) == "nccl" else mine
        dist.all_reduce(mine, group=group)
    return mine.tolist()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.rows, ctx.rank = len(part), dist.get_rank(group)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows], None


def gathered(part: Tensor, group: Any) -> Tensor:
    """All hidden states of a sequence-parallel group, for a loss with ``tp_group=group``.

    Such a loss gives every rank the whole gradient of the hidden states, so that on the way back each takes its rows,
    and there is nothing to sum.

    Args:
        part: [N / R, H] of this rank; the same number of rows on each of R ranks.
        group: the ranks, in the order of their rows.

    Returns:
        [N, H] on every rank, differentiable.
    """
    return _Gathered.apply(part, group)  # type: ignore[no-any-return]
