"""One clear error before any work starts: which argument, what it got, what it wants."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 2**63 - 1  # Torch computes with no larger integer.
CHUNK = 2**20  # How many elements are looked at together where what is looked at may be as large as a head.


def show(x: object) -> str:
    """A tensor by shape, dtype and device (and layout, if it is not dense); anything else by its repr, if short."""
    if isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) for y in x):
        return f"({', '.join(show(y) for y in x[:4])}{', ...' if len(x) > 4 else ''})"
    if not isinstance(x, Tensor):
        text = " ".join(repr(x).split())
        return text if len(text) <= 80 else f"{type(x).__name__} {text[:60]}..."
    dtype, layout = str(x.dtype).removeprefix("torch."), str(x.layout).removeprefix("torch.")
    if x.is_nested:
        return f"a nested {dtype} tensor"
    dense = "" if x.layout == torch.strided else f"{layout} "
    kind = f"{type(x).__name__} of " if of_a_library(x) else "lazily negated " if x.is_neg() else dense
    return f"{kind}{dtype}{list(x.shape)} on {x.device}"


def wants(condition: bool, name: str, got: object, want: str) -> None:
    """Raise ValueError unless ``condition`` holds; every check of arguments in this package ends here."""
    if not condition:
        raise ValueError(f"{name}: got {show(got)}, wants {want}")


def is_number(x: object) -> bool:
    """An int or float that torch can compute with, infinities included."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    return abs(x) <= LARGEST if isinstance(x, int) else not math.isnan(x)


def is_finite(x: object) -> bool:
    return is_number(x) and math.isfinite(x)  # type: ignore[arg-type]


def plain(x: Any) -> Any:
    """A number of numpy, which counting gives, as one of Python; anything else as it is."""
    return x.item() if type(x).__module__ == "numpy" and type(x).__name__ != "ndarray" else x


def is_count(x: object) -> TypeGuard[int]:
    """A whole number of one or more."""
    return isinstance(x, int) and not isinstance(x, bool) and 0 < x <= LARGEST


def flags(**given: object) -> None:
    for name, x in given.items():
        wants(isinstance(x, bool), name, x, "True or False")


def wanted(options: Mapping[str, Any]) -> bool:
    """Whether the data is to be looked into."""
    on = options.get("checks", True)
    flags(checks=on)
    return on


def positive(name: str, x: object) -> None:
    wants(is_finite(x) and x > 0, name, x, "a positive finite number")  # type: ignore[operator]


def one_of(name: str, x: object, choices: tuple[str | None, ...]) -> None:
    fits = (x is None or isinstance(x, str)) and x in choices
    wants(fits, name, x, "one of " + ", ".join(map(repr, choices)))


def of_a_library(x: Tensor) -> bool:
    """Whether it is a DTensor, a FakeTensor or another class with operations of its own, whose memory is elsewhere."""
    of_torch: object = getattr(Tensor, "__torch_dispatch__")  # noqa: B009 (pyright would bind it as a method)
    return getattr(type(x), "__torch_dispatch__") is not of_torch  # noqa: B009


def tensor(name: str, x: object, kind: str = "a tensor") -> None:
    """One whose values lie in memory: neither sparse, nested, quantised, of a library, negated, nor without data."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wants {kind}")
    dense = x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.device.type == "meta")
    wants(dense, name, x, f"{kind}, dense and with data")
    if torch.compiler.is_compiling():  # Inside a compiler nothing is either, and it cannot follow the questions.
        return
    wants(not x.is_neg(), name, x, f"{kind} as resolve_neg() gives it")
    wants(not of_a_library(x), name, x, f"{kind} of torch itself: a DTensor has to_local() and full_tensor()")


def float_tensor(name: str, x: object, dims: int | None = None) -> None:
    tensor(name, x)
    assert isinstance(x, Tensor)
    wants(x.dtype in FLOATS, name, x, "float32, bfloat16, float16 or float64")
    if dims is not None:
        wants(x.dim() == dims, name, x, f"{dims} dimension{'s' if dims > 1 else ''}")


def shaped(name: str, x: object, shape: tuple[int, ...], device: torch.device, why: str) -> None:
    tensor(name, x)
    assert isinstance(x, Tensor)
    wants(tuple(x.shape) == tuple(shape), name, x, f"shape {list(shape)}, {why}")
    wants(x.device == device, name, x, f"device {device}, where hidden is")


def bool_tensor(name: str, x: object, shape: tuple[int, ...], device: torch.device, why: str) -> None:
    tensor(name, x, f"a bool tensor of shape {list(shape)}, {why}")
    assert isinstance(x, Tensor)
    wants(x.dtype == torch.bool, name, x, "bool")
    shaped(name, x, shape, device, why)


def for_autograd(x: Tensor) -> Tensor:
    """The same where autograd can save it: rollouts are often made under ``torch.inference_mode``."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def process_group(name: str, x: object) -> None:
    # A bare backend such as ProcessGroupGloo is no ProcessGroup and serves as well.
    fits = all(callable(getattr(x, method, None)) for method in ("rank", "size", "allreduce"))
    wants(x is None or fits, name, x, "a torch.distributed.ProcessGroup, or None")


def transformed() -> bool:
    """Whether torch.func is at work, whose tensors have no data that a kernel or a check could read."""
    # There is no public way to ask, and torch.autograd.Function asks like this, too.
    return torch._C._are_functorch_transforms_active()


def no_transforms() -> None:
    if transformed():
        raise RuntimeError(
            "rlhf_kernels: got a call under torch.func (vmap, grad, jvp, jacrev), wants tensors with memory that a "
            "kernel can read: use backward() or torch.autograd.grad, and pack sequences where you would vmap"
        )


class Answer(NamedTuple):
    """What a GPU will have said about facts of the data once ``there``."""

    there: Any  # an event
    fine: Tensor  # [k] bool, in memory of the host
    messages: tuple[str, ...]


_awaited: deque[Answer] = deque()  # Any thread may append to it and pop from it.


def holds(condition: Tensor, message: str) -> None:
    """Check a fact of the data. Free on a CPU; on a GPU nobody waits for the answer, which ``report`` reads later."""
    hold([(condition, message)])


def hold(facts: list[tuple[Tensor, str]]) -> None:
    """``holds`` for several facts, which a GPU tells with one copy."""
    if not facts or transformed():
        return
    device = facts[0][0].device
    if device.type != "cuda":
        for condition, message in facts:
            if not bool(condition):
                raise ValueError(message)
    elif not torch.cuda.is_current_stream_capturing():  # a captured graph asks nobody
        fine = torch.empty(len(facts), dtype=torch.bool, pin_memory=True)
        fine.copy_(torch.stack([condition for condition, _ in facts]), non_blocking=True)
        there = torch.cuda.Event()
        there.record(torch.cuda.current_stream(device))
        _awaited.append(Answer(there, fine, tuple(message for _, message in facts)))


def report() -> None:
    """Raise the first check of an earlier call that has been found to fail; answers that are not there yet can wait."""
    while _awaited:
        try:
            answer = _awaited.popleft()
        except IndexError:  # Another thread was faster.
            return
        if not answer.there.query():
            _awaited.appendleft(answer)
            return
        if not bool(answer.fine.all()):
            _awaited.clear()  # what else failed may have failed for the same reason
            message = answer.messages[int(answer.fine.int().argmin())]
            raise ValueError(f"{message} (in an earlier call, which could not wait for the GPU to say so)")


def finite(where: Tensor | Callable[[], Tensor] | None = None, **given: Tensor | None) -> None:
    """Each of these holds numbers wherever ``where``, of the same shape, is true (None: everywhere).

    A function is only asked for it if something is not finite, or if nobody waits for the answer.
    """
    facts = []
    for name, x in given.items():
        if x is None or not x.is_floating_point() or transformed():
            continue
        if not x.is_cuda and bool(torch.isfinite(x.detach().sum())):  # This pass is mostly the only one.
            continue
        counts = where() if callable(where) else where
        fine = torch.isfinite(x.detach())
        fine = fine if counts is None else fine | ~counts
        message = f"{name}: got NaN or infinity where it counts, wants finite numbers"
        if not x.is_cuda and not bool(fine.all()):
            at = (~fine).nonzero()[0].tolist()
            where_at = f" at {at[0] if len(at) == 1 else at}" if at else ""
            raise ValueError(f"{name}: got {x.detach()[tuple(at)].item()}{where_at}, wants finite numbers")
        facts.append((fine.all(), message))
    hold(facts)


def cu_seqlens_of(name: str, cu_seqlens: object, rows: int, device: torch.device, checks: bool = True) -> Tensor:
    """[S+1] int64 boundaries, from 0 to ``rows``, never falling."""
    tensor(name, cu_seqlens, "an integer tensor [S+1]")
    assert isinstance(cu_seqlens, Tensor)
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    wants(integer and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0, name, cu_seqlens, "int32 or int64 [S+1]")
    wants(cu_seqlens.device == device, name, cu_seqlens, f"device {device}")
    cu = for_autograd(cu_seqlens.long().contiguous())
    if checks:
        ends = (cu[0] == 0) & (cu[-1] == rows), f"{name}: wants to run from 0 to {rows}, the number of rows given"
        hold([ends, ((cu.diff() >= 0).all(), f"{name}: wants boundaries that never fall")])
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
    wants(weight.numel() > 0, "weight", weight, "at least one row and one column")
    wants(weight.dtype == hidden.dtype, "weight", weight, f"the dtype of hidden, {hidden.dtype}")
    wants(weight.device == hidden.device, "weight", weight, f"device {hidden.device}, where hidden is")
    target_arguments(hidden, targets, per_position)


def ignore_index(x: object) -> None:
    fits = isinstance(x, int) and not isinstance(x, bool) and abs(x) <= LARGEST
    wants(fits, "ignore_index", x, "a whole number")


def target_arguments(hidden: Tensor, targets: Tensor, per_position: int, aligned: str = "hidden") -> None:
    name = "token_ids" if per_position else "targets"
    tensor(name, targets, "an integer tensor")
    wants(targets.dtype in (torch.int64, torch.int32), name, targets, "int64 or int32")
    lead = tuple(targets.shape[: targets.dim() - per_position])
    wants(
        targets.dim() >= per_position and lead == tuple(hidden.shape[:-1]),
        name,
        targets,
        f"shape {list(hidden.shape[:-1])}{' + [K]' * per_position}, aligned with {aligned}",
    )
    wants(targets.device == hidden.device, name, targets, f"device {hidden.device}, where {aligned} is")


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of a matrix, a few megabytes at a time."""
    return x.split(max(1, CHUNK // max(1, x.shape[-1])))


def rows_are_finite(x: Tensor) -> Tensor:
    """[N, H] -> [N] bool. One reading of ``x`` and no copy: a product with a number so small that nothing overflows."""
    return torch.isfinite(torch.mv(x, x.new_full(x.shape[1:], 2.0**-20)))


def finite_rows(hidden: Tensor, kept: Tensor | None, real: Tensor | None = None) -> None:
    """Kept hidden states hold numbers."""
    if kept is None or hidden.is_cuda:
        fine = rows_are_finite(hidden) if kept is None else rows_are_finite(hidden)[kept]
    else:
        fine = torch.cat([rows_are_finite(hidden[part]) for part in kept.split(max(1, CHUNK // hidden.shape[1]))])
    fine = fine if real is None else fine | ~real
    holds(fine.all(), "hidden: got NaN or infinity in a row whose target is not ignored, wants finite numbers")
