"""The nodes that a compiled graph has: custom ops that run a public function as it runs without a compiler.

An op takes tensors, integers, and a text that says which argument is what: a literal of
``(module:function, names of metrics or statistics, [(argument, value), ...])``, where ``{'tensor': i, 'grad': bool}``,
``{'float': i}`` (both among the tensors) and ``{'int': i}`` stand for what lies beside it, and a list of pairs for a
dict.
"""

from __future__ import annotations

import ast
import importlib
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.boundary import FIRST_ONLY
from rlhf_kernels.engine.span import stats_dtype
from rlhf_kernels.types import LossOutput, TokenStats

Arguments = dict[str, Any]


def _arguments(tensors: list[Tensor], ints: list[int], text: str) -> Arguments:
    def value(x: Any) -> Any:
        match x:
            case {"tensor": at, "grad": grad}:
                return tensors[at].detach().requires_grad_(grad)
            case {"int": at}:
                return ints[at]
            case {"float": at}:
                return tensors[at].item()
            case tuple():
                return tuple(value(y) for y in x)
            case list():
                return {key: value(y) for key, y in x}
        return x

    return {name: value(x) for name, x in ast.literal_eval(text)[2]}


def _leaves(arguments: Arguments) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}


def _eager(text: str, arguments: Arguments) -> Any:
    module, name = ast.literal_eval(text)[0].split(":")
    return getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def _autograd() -> Any:
    """An op runs below autograd, which the function inside needs."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for one in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor, key.ADInplaceOrView):
        excluded = excluded.remove(one)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _wanted(text: str) -> list[int]:
    """Which of the tensors get a gradient."""
    given = [x for _, x in ast.literal_eval(text)[2]]
    return [x["tensor"] for x in given if isinstance(x, dict) and x.get("grad")]


def _gradients(outputs: list[Tensor], arguments: Arguments, upstream: list[Tensor] | None = None) -> list[Tensor]:
    leaves = list(_leaves(arguments).values())
    if not leaves:
        return []
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(found, leaves, strict=True)]


@torch.library.custom_op("rlhf_kernels::loss", mutates_args=())
def loss_op(tensors: list[Tensor], ints: list[int], text: str) -> list[Tensor]:
    """The loss, its metrics in one vector, and the gradients of those that want one."""
    arguments = _arguments(tensors, ints, text)
    with _autograd(), torch.enable_grad():
        out: LossOutput = _eager(text, arguments)
        grads = _gradients([out.loss], arguments)
    dtype, device = stats_dtype(tensors[0].dtype), tensors[0].device
    logged = [out.metrics[name].to(dtype) for name in ast.literal_eval(text)[1]]
    return [out.loss.detach().to(dtype), torch.stack(logged).to(device), *grads]


@loss_op.register_fake
def _(tensors: list[Tensor], ints: list[int], text: str) -> list[Tensor]:
    dtype, device = stats_dtype(tensors[0].dtype), tensors[0].device
    logged = tensors[0].new_empty(len(ast.literal_eval(text)[1]), dtype=dtype)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in (tensors[i] for i in _wanted(text))]
    return [logged.new_empty(()), logged, *grads]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.ints, text = inputs
    ctx.set_materialize_grads(False)
    ctx.wanted, ctx.count = _wanted(text), len(tensors)
    ctx.save_for_backward(*output[2:])


def _for_inputs(grads: list[Tensor | None], ctx: Any) -> tuple[Any, ...]:
    """An empty list of numbers passes for a list of tensors, and None is no gradient of that."""
    return grads, None if ctx.ints else [], None


def _scaled(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None] * ctx.count
    if any(g is not None for g in upstream[2:]):
        raise RuntimeError(FIRST_ONLY)
    if upstream[0] is not None:
        for i, grad in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            found[i] = grad * upstream[0].to(grad.dtype)
    return _for_inputs(found, ctx)


loss_op.register_autograd(_scaled, setup_context=_keep_gradients)


@torch.library.custom_op("rlhf_kernels::statistics", mutates_args=())
def statistics_op(tensors: list[Tensor], ints: list[int], text: str) -> list[Tensor]:
    """The statistics that the text names."""
    with torch.no_grad():
        found = _named(_eager(text, _arguments(tensors, ints, text)), text)
    return [x.clone() for x in found]  # what an op returns has memory of its own


def _named(out: TokenStats | Tensor, text: str) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [getattr(out, name) for name in ast.literal_eval(text)[1]]


@statistics_op.register_fake
def _(tensors: list[Tensor], ints: list[int], text: str) -> list[Tensor]:
    _, names, given = ast.literal_eval(text)
    targets = next(x["tensor"] for name, x in given if name in ("targets", "token_ids"))
    dtype = stats_dtype(tensors[0].dtype)
    return [torch.empty(tensors[targets].shape, dtype=dtype, device=tensors[0].device) for _ in names]


@torch.library.custom_op("rlhf_kernels::statistics_backward", mutates_args=())
def statistics_backward_op(
    upstream: list[Tensor], given: list[int], tensors: list[Tensor], ints: list[int], text: str
) -> list[Tensor]:
    """The gradients that the text asks for, from those of the statistics at the places ``given``."""
    arguments = _arguments(tensors, ints, text)
    with _autograd(), torch.enable_grad():
        outputs = _named(_eager(text, arguments), text)
        return _gradients([outputs[i] for i in given], arguments, upstream)


@statistics_backward_op.register_fake
def _(upstream: list[Tensor], given: list[int], tensors: list[Tensor], ints: list[int], text: str) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (tensors[i] for i in _wanted(text))]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.ints, ctx.text = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _computed_again(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    found: list[Tensor | None] = [None] * len(tensors)
    given = [i for i, g in enumerate(upstream) if g is not None]
    if given:
        present = [g.contiguous() for g in upstream if g is not None]
        grads = statistics_backward_op(present, given, tensors, ctx.ints, ctx.text)
        for i, grad in zip(_wanted(ctx.text), grads, strict=True):
            found[i] = grad
    return _for_inputs(found, ctx)


statistics_op.register_autograd(_computed_again, setup_context=_keep_inputs)
