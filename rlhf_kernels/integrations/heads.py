"""The linear layer at the end of a model: bare, or as PEFT wraps it. Nothing here imports PEFT or transformers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_of(head: Any) -> Tensor:
    """[V, H] by which the head multiplies now: W, or W + scaling B A with LoRA, differentiable in A and B."""
    head = current(head)
    if not _is_lora(head):
        return head.weight
    weight = head.base_layer.weight
    for name in _adapters(head):
        more = head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
        weight = weight + more.to(weight.dtype)
    return weight


def bias_of(head: Any) -> Tensor | None:
    """[V] that the head adds now, or None."""
    head = current(head)
    if not _is_lora(head):
        return head.bias
    bias = head.base_layer.bias
    for name in _adapters(head):
        if head.lora_B[name].bias is not None:
            more = (head.scaling[name] * head.lora_B[name].bias).to(head.base_layer.weight.dtype)
            bias = more if bias is None else bias + more
    return bias


def current(head: Any) -> Any:
    """The copy of a head that PEFT uses now, where it keeps several (``modules_to_save``)."""
    while hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        off = head.disable_adapters or not head.active_adapters
        head = head.original_module if off else head.modules_to_save[head.active_adapters[0]]
    return head


def _is_lora(head: Any) -> bool:
    return type(head).__module__.startswith("peft.tuners.lora.") and type(head).__name__ == "Linear"


def _adapters(head: Any) -> list[str]:
    """LoRA adapters that the head adds to its weight at the moment."""
    if head.merged and head.disable_adapters:
        raise ValueError("model: an adapter is merged into the head and switched off; wants unmerge_adapter() first")
    if head.merged or head.disable_adapters:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def check_linear(model: Any, head: Any) -> None:
    """A linear layer with a weight that can be read: kinds that only look like one would be silently wrong."""
    head = current(head)
    if _is_lora(head):
        names = list(head.lora_A)
        odd = [n for n in names if n in head.lora_variant or getattr(head.lora_dropout[n], "p", 0.0)]
        if odd:
            refuse(model, f"LoRA on its head is more than W + B A (a variant or dropout, in adapters {odd})")
        head = head.base_layer
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        refuse(model, f"its head is a {type(head).__module__}.{type(head).__name__}, wants a plain torch.nn.Linear")
    weight = head.weight
    kind = type(weight).__name__
    if kind == "DTensor":
        refuse(model, "its head is sharded (DTensor); wants to be taken apart before it is")
    if weight.is_meta or not weight.numel():
        refuse(model, "the weight of its head is not here (on meta, offloaded, or partitioned)")
    if weight.dtype not in FLOATS or kind not in ("Parameter", "Tensor"):
        refuse(model, f"the weight of its head is quantised ({kind}, {weight.dtype}), wants floating point")


def refuse(model: Any, reason: str) -> NoReturn:
    """The one error of everything that cannot be done with a model."""
    raise ValueError(f"model: {type(model).__name__} cannot be taken apart: {reason}")


def linear(hidden: Tensor, head: Any) -> Tensor:
    """What the head says of hidden states: [..., H] to [..., V]."""
    return nn.functional.linear(hidden, weight_of(head), bias_of(head))


def unwrap(model: Any) -> Any:
    """The model of transformers inside DDP and PEFT."""
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
            refuse(model, "it is compiled as a whole, head included; wants only its backbone compiled")
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
