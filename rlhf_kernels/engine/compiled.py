"""Inside ``torch.compile`` a public function is one node of the graph, which runs the eager function.

The compiler sees a custom op that takes the tensors and numbers of the call, and a text that says which argument is
what. A loss returns its gradients too, as ``fused_loss`` takes them in the forward pass anyway. Statistics cannot know
what their gradient will be, and a graph carries tensors only, not a backend's residual: they are computed again in
backward, four matrix products of size N H V and one for the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_kernels.engine.boundary import cast_inputs, cast_reference
from rlhf_kernels.engine.nodes import Arguments, loss_op, statistics_op
from rlhf_kernels.types import LossOutput, TokenStats

F = TypeVar("F", bound=Callable[..., Any])

HEADS = ("hidden", "weight", "bias", "ref", "ref_hidden", "ref_weight")  # Autocast casts these.
LOST = ("tolerance/lost", "tolerance/dense")  # metrics of any loss with a tolerance
NO_BUFFER = "rlhf_kernels: weight_grad is added to in place, so such a call is not part of a compiled graph"
NO_ROOM = "rlhf_kernels: float16 has no room for gradients still to be scaled, so they are no part of a compiled graph"
NO_GROUP = "rlhf_kernels: ranks meet in a call with tp_group, so it is not part of a compiled graph"
NO_OBJECTIVE = "rlhf_kernels: fused_loss calls the caller's objective, so it is not part of a compiled graph"


class _Flat:
    """The arguments of a call, as an op can take them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []

    def text(self, name: str, x: Any) -> str:
        """A literal that stands for ``x``; tensors and numbers are put aside, so that their values may change."""
        if isinstance(x, Tensor):
            self.tensors.append(x)
            return f"{{'tensor': {len(self.tensors) - 1}, 'grad': {torch.is_grad_enabled() and x.requires_grad}}}"
        if x is None or isinstance(x, (bool, str)):
            return f"{x!r}"
        if isinstance(x, int):
            self.ints.append(x)
            return f"{{'int': {len(self.ints) - 1}}}"
        if isinstance(x, float):  # a graph is compiled anew for another float, but not for another tensor
            self.tensors.append(torch.ones((), dtype=torch.float64) * x)
            return f"{{'float': {len(self.tensors) - 1}}}"
        if isinstance(x, (tuple, list)):
            return "(" + "".join([self.text(name, y) + "," for y in x]) + ")"
        if isinstance(x, dict):
            return "[" + "".join([f"({key!r}, {self.text(name, x[key])})," for key in x]) + "]"
        raise TypeError(f"{name}: got {type(x)}, wants a tensor, number, string or None inside torch.compile")


def _cast(arguments: Arguments) -> None:
    if "logits" in arguments:
        return
    for name in HEADS:
        x = arguments.get(name)
        if isinstance(x, Tensor):
            arguments[name] = cast_inputs(x)[0]
        elif isinstance(x, (tuple, list)):
            arguments[name] = tuple(cast_inputs(*x))
    if "ref_head" in arguments:
        arguments["ref_head"] = cast_reference(None, arguments["ref_head"])[1]


def _given(x: Any) -> bool:
    return x is not None and (isinstance(x, (Tensor, tuple)) or x != 0)


def _node(op: Callable[..., list[Tensor]], public: str, names: tuple[str, ...], arguments: Arguments) -> list[Tensor]:
    arguments.pop("loss_scale", None)  # belongs to weight_grad
    flat = _Flat()
    given = "".join([f"({name!r}, {flat.text(name, arguments[name])})," for name in arguments])
    return op(flat.tensors, flat.ints, f"({public!r}, {names!r}, [{given}])")


def _why_apart(arguments: Arguments) -> str:
    if arguments.get("tp_group") is not None:
        return NO_GROUP
    return "" if arguments.get("weight_grad") is None else NO_BUFFER


def _has_room(arguments: Arguments) -> bool:
    """Whether gradients keep their digits in the dtype of what they belong to until a loss scale reaches them."""
    return not torch.is_grad_enabled() or not any(
        isinstance(x, Tensor) and x.requires_grad and x.dtype == torch.float16 for x in arguments.values()
    )


def _prepared(parameters: tuple[str, ...], arguments: Arguments) -> Arguments:
    """As autocast casts them, in the function's order: its first one says device and dtype of its results."""
    ordered = {name: arguments[name] for name in parameters if name in arguments}
    ordered.update({name: arguments[name] for name in arguments if name not in ordered})
    _cast(ordered)
    return ordered


def _outside(fn: Callable[..., Any], why: str) -> Callable[..., Any]:
    """Leave the graph for one eager call."""
    torch._dynamo.graph_break(msg=why)
    return torch.compiler.disable(fn, reason=why)


def _parameters(fn: Callable[..., Any]) -> tuple[str, ...]:
    return fn.__code__.co_varnames[: fn.__code__.co_argcount]


def compilable_loss(*metrics: str, **optional: tuple[str, ...]) -> Callable[[F], F]:
    """Decorate a public loss with the names of its metrics, and of those that there are if certain arguments are."""

    def decorate(fn: F) -> F:
        public, parameters = f"{fn.__module__}:{fn.__name__}", _parameters(fn)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> LossOutput:
            if not torch.compiler.is_compiling():
                return fn(*args, **kwargs)
            arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
            why = _why_apart(arguments)
            if why:
                return _outside(fn, why)(*args, **kwargs)
            arguments = _prepared(parameters, arguments)
            if not _has_room(arguments):
                return _outside(fn, NO_ROOM)(*args, **kwargs)
            names = metrics
            for name, needs in optional.items():
                if any(_given(arguments.get(need)) for need in needs):
                    names = (*names, name)
            names = names if arguments.get("tolerance") is None else (*names, *LOST)
            loss, logged, *_ = _node(loss_op, public, names, arguments)
            return LossOutput(loss, dict(zip(names, logged.detach().unbind(), strict=True)))

        return call  # type: ignore[return-value]

    return decorate


def compilable_statistics(*fields: str) -> Callable[[F], F]:
    """Decorate a public function that returns ``TokenStats`` with these fields, or one tensor."""

    def decorate(fn: F) -> F:
        public, parameters = f"{fn.__module__}:{fn.__name__}", _parameters(fn)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> TokenStats | Tensor:
            if not torch.compiler.is_compiling():
                return fn(*args, **kwargs)
            arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
            why = _why_apart(arguments)
            if why:
                return _outside(fn, why)(*args, **kwargs)
            arguments = _prepared(parameters, arguments)
            arguments.pop("overwrite", None)  # a permission; the compiler plans its own memory
            found = _node(statistics_op, public, fields, arguments)
            if len(fields) == 1:
                return found[0]
            logp, entropy, lse, mean_logit, top1 = found
            return TokenStats(logp, entropy, lse, mean_logit, top1.detach())

        return call  # type: ignore[return-value]

    return decorate


def one_break(fn: F) -> F:
    """Decorate a function that takes the caller's own code."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside(fn, NO_OBJECTIVE)(*args, **kwargs)
        return fn(*args, **kwargs)

    return call  # type: ignore[return-value]
