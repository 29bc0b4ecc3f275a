"""Where the machinery of torch ends that the engine does not take part in: autocast and higher derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FIRST_ONLY = (
    "rlhf_kernels: got a request for a second derivative, wants first derivatives only: the logits are gone by then. "
    "Build a gradient penalty on plain torch"
)
NO_FORWARD_MODE = "rlhf_kernels: got a tangent of forward-mode differentiation, wants backward(): there is no other way"
NO_BATCHES = (
    "rlhf_kernels: got several upstream gradients at once (is_grads_batched=True, jacobian(vectorize=True)), wants one "
    "backward after another"
)


def _active(device: torch.device) -> bool:
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def cast_inputs(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, what belongs to the head in autocast's dtype, as ``F.linear`` would cast it."""

    def cast(x: Tensor | None) -> Tensor | None:
        if not isinstance(x, Tensor) or not _active(x.device):
            return x
        castable = x.is_floating_point() and x.dtype != torch.float64 and x.layout == torch.strided
        return x.to(torch.get_autocast_dtype(x.device.type)) if castable else x

    return [cast(x) for x in tensors]


def cast_reference(ref: Any, ref_head: Any) -> tuple[Any, Any]:
    """The same for a reference's (hidden, weight) and the bias among the options of its head."""
    if isinstance(ref, (tuple, list)):
        ref = tuple(cast_inputs(*ref))
    if isinstance(ref_head, dict) and ref_head.get("bias") is not None:
        ref_head = {**ref_head, "bias": cast_inputs(ref_head["bias"])[0]}
    return ref, ref_head


def without_autocast(like: object) -> AbstractContextManager[Any]:
    """Nothing inside is cast again on the device of ``like``: the engine has decided where float32 matters."""
    if isinstance(like, Tensor) and _active(like.device):
        return torch.autocast(like.device.type, enabled=False)
    return nullcontext()


def _refuse_batches(upstream: tuple[Tensor | None, ...]) -> None:
    for grad in upstream:
        try:
            _ = None if grad is None else grad.data_ptr()
        except RuntimeError:
            raise RuntimeError(NO_BATCHES) from None


class _Once(torch.autograd.Function):
    """Passes a gradient on; whoever differentiates it hears that this cannot be done."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor):
        raise RuntimeError(FIRST_ONLY)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``backward(ctx, saved, *upstream)`` of an autograd function that has saved its differentiable inputs.

    It is handed the saved tensors, which activation checkpointing lets nobody read twice. It runs without a graph, and
    without autocast, which may be on where ``backward()`` is called. Where the caller wants a graph, the gradients
    depend on the inputs all the same: torch's ``once_differentiable`` looks at the upstream gradient alone, so that
    a gradient penalty would be a constant, unsaid.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_batches(upstream)
        saved = ctx.saved_tensors  # This raises if one was changed in place meanwhile.
        with torch.no_grad(), without_autocast(saved[0]):
            grads = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():
            return grads
        return tuple(None if g is None else _Once.apply(g, *saved, *upstream) for g in grads)

    return run


def refuse_tangents(ctx: Any, *tangents: Any) -> None:
    """The ``jvp`` of an autograd function that has none."""
    raise RuntimeError(NO_FORWARD_MODE)
