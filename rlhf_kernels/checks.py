"""One clear error before any work starts: which argument, what it got, what it wants."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def show(x: object) -> str:
    """A tensor by shape, dtype and device; anything else by its repr."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    return repr(x)


def wants(condition: bool, name: str, got: object, want: str) -> None:
    """Raise ValueError unless ``condition`` holds; every check of arguments in this package ends here."""
    if not condition:
        raise ValueError(f"{name}: got {show(got)}, wants {want}")


def is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and not math.isnan(x)


def positive(name: str, x: object) -> None:
    wants(is_number(x) and 0 < x < math.inf, name, x, "a positive finite number")  # type: ignore[operator]


def float_tensor(name: str, x: object, dims: int | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wants a tensor")
    wants(x.dtype in FLOATS, name, x, "float32, bfloat16, float16 or float64")
    if dims is not None:
        wants(x.dim() == dims, name, x, f"{dims} dimension{'s' if dims > 1 else ''}")


def shaped(name: str, x: object, shape: tuple[int, ...], device: torch.device, why: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wants a tensor")
    wants(tuple(x.shape) == tuple(shape), name, x, f"shape {list(shape)}, {why}")
    wants(x.device == device, name, x, f"device {device}, where hidden is")


class Answer(NamedTuple):
    """What a GPU will have said about a fact of the data once ``there``."""

    there: Any  # an event
    fine: Tensor  # [] bool, in memory of the host
    message: str


_awaited: list[Answer] = []


def holds(condition: Tensor, message: str) -> None:
    """Check a fact of the data. Free on a CPU; on a GPU nobody waits for the answer, which ``report`` reads later."""
    if not condition.is_cuda:
        if not bool(condition):
            raise ValueError(message)
    elif not torch.cuda.is_current_stream_capturing():  # a captured graph asks nobody
        fine = torch.empty((), dtype=torch.bool, pin_memory=True)
        fine.copy_(condition, non_blocking=True)
        there = torch.cuda.Event()
        there.record(torch.cuda.current_stream(condition.device))
        _awaited.append(Answer(there, fine, message))


def report() -> None:
    """Raise the first check of an earlier call that has been found to fail; answers that are not there yet can wait."""
    while _awaited and _awaited[0].there.query():
        answer = _awaited.pop(0)
        if not bool(answer.fine):
            _awaited.clear()  # what else failed may have failed for the same reason
            raise ValueError(f"{answer.message} (in an earlier call, which could not wait for the GPU to say so)")


def cu_seqlens_of(name: str, cu_seqlens: object, rows: int, device: torch.device, checks: bool = True) -> Tensor:
    """[S+1] int64 boundaries, from 0 to ``rows``, never falling."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: got {type(cu_seqlens).__name__}, wants an integer tensor [S+1]")
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    wants(integer and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0, name, cu_seqlens, "int32 or int64 [S+1]")
    wants(cu_seqlens.device == device, name, cu_seqlens, f"device {device}")
    cu = cu_seqlens.long()
    if checks:
        holds((cu[0] == 0) & (cu[-1] == rows), f"{name}: wants to run from 0 to {rows}, the number of rows given")
        holds((cu.diff() >= 0).all(), f"{name}: wants boundaries that never fall")
    return cu


def head_arguments(hidden: Tensor, weight: Tensor, targets: Tensor, per_position: int) -> None:
    """Shapes, dtypes and devices of a head and its rows. ``per_position``: trailing dimensions of targets per row."""
    float_tensor("hidden", hidden)
    float_tensor("weight", weight, 2)
    wants(
        hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1],
        "hidden",
        hidden,
        f"[..., {weight.shape[1]}] as weight is {list(weight.shape)}",
    )
    wants(weight.shape[0] > 0, "weight", weight, "at least one row")
    wants(weight.dtype == hidden.dtype, "weight", weight, f"the dtype of hidden, {hidden.dtype}")
    wants(weight.device == hidden.device, "weight", weight, f"device {hidden.device}, where hidden is")
    target_arguments(hidden, targets, per_position)


def target_arguments(hidden: Tensor, targets: Tensor, per_position: int) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: got {type(targets).__name__}, wants an integer tensor")
    wants(targets.dtype in (torch.int64, torch.int32), "targets", targets, "int64 or int32")
    lead = tuple(targets.shape[: targets.dim() - per_position])
    wants(
        lead == tuple(hidden.shape[:-1]),
        "targets",
        targets,
        f"shape {list(hidden.shape[:-1])}{' + [K]' * per_position}, aligned with hidden",
    )
    wants(targets.device == hidden.device, "targets", targets, f"device {hidden.device}, where hidden is")


def finite_rows(hidden: Tensor, kept: Tensor | None, real: Tensor | None = None) -> None:
    """Kept hidden states hold numbers. One sum per row: no mask as large as hidden is ever made."""
    sums = hidden.sum(-1) if hidden.dtype in (torch.float32, torch.float64) else hidden.sum(-1, dtype=torch.float32)
    sums = sums if kept is None else sums[kept]
    sums = sums if real is None else sums.where(real, 0.0)
    holds(
        torch.isfinite(sums).all(),
        "hidden: got NaN or infinity in a row whose target is not ignored, wants finite numbers",
    )


def explain_logits(lse: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Called on the first statistics of a call: a NaN in the head shows in every one of them."""
    if lse.is_cuda:
        holds(torch.isfinite(lse).all(), "weight or bias: got NaN or infinity, wants finite numbers")
        return
    if bool(torch.isfinite(lse).all()):
        return
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: got NaN or infinity, wants finite numbers")
    raise ValueError("hidden, weight: the logits overflow; wants logits that float32 can hold")
