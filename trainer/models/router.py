"""The load-balancing loss of a mixture of experts, where the config of a model asks for it.

Fedus et al. 2021, https://arxiv.org/abs/2101.03961, section 2.2. transformers computes it in the forward of the whole
model, over all tokens that it is given, so we run that one, its head without rows, and take what it says. Micro-batches
are balanced each for itself, as in transformers under gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from trainer.models.policy import Policy, ScalarModel

METRIC = "aux_loss"
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def coefficient(model: Any) -> float:
    """What the model multiplies its load-balancing loss by; zero where its config does not ask for one."""
    text = model.config.get_text_config()
    if not any(getattr(config, "output_router_logits", False) for config in (model.config, text)):
        return 0.0
    known = [getattr(place, name, None) for place in (model, text) for name in COEFFICIENTS]
    return float(next((x for x in known if x is not None), 0.0))


def balanced(policy: Policy, share: float, loss: Callable[[], rk.LossOutput]) -> rk.LossOutput:
    """A loss of one micro-batch and, where the model asks for it, its load-balancing loss as the metric ``aux_loss``.

    Args:
        policy: Runs forward once in ``loss``, on this micro-batch.
        share: Of the micro-batch in the whole step, by what the optimizer weighs it with, so that the losses of all
            micro-batches add up to their mean.
        loss: Gives the loss without it.
    """
    factor = coefficient(policy.model)
    if not factor:
        return loss()
    said: list[Tensor] = []

    def listen(_model: Any, _given: Any, output: Any) -> None:
        if isinstance(found := getattr(output, "aux_loss", None), Tensor):
            said.append(found)

    parts, hook = policy.parts, policy.model.register_forward_hook(listen)
    policy.parts = replace(parts, plain=False)  # The backbone alone would not say it.
    try:
        out = loss()
    finally:
        policy.parts = parts
        hook.remove()
    if not said:  # Its config asks, and transformers computes none for it.
        return out
    aux = said[-1].to(out.loss.device)
    return rk.LossOutput(out.loss + factor * share * aux, out.metrics | {METRIC: aux.detach()})


def say_if_without(policy: Policy, note: Callable[[str], None]) -> None:
    """Tries whether ``balanced`` finds a loss to add, and says so where the model asks for one and has none."""
    ids = torch.tensor([[0, 1, 2, 3]], device=policy.weight.device)

    def nothing() -> rk.LossOutput:
        return rk.LossOutput(policy.states(input_ids=ids, use_cache=False).sum(), {})

    with torch.no_grad():
        if coefficient(policy.model) and METRIC not in balanced(policy, 1.0, nothing).metrics:
            say_without(policy, note, f"transformers computes none for {type(policy.model).__name__}")


def say_without(
    model: Policy | ScalarModel, note: Callable[[str], None], why: str = "sft and the preference stages add it"
) -> None:
    """Says that a stage trains without it, where the model asks for it."""
    if factor := coefficient(model.model):
        asks = f"The config of the model asks for {factor:g} times its router's load-balancing loss"
        note(f"{asks}; this stage trains without it: {why}.")
