"""verl's fused-kernel hook and policy losses on this package's head. For verl>=0.9.1,<0.10.

With ``use_fused_kernels`` verl asks its model for log-probabilities and entropies in place of logits. ``fuse(model)``
makes one model answer by ``token_stats``; neither verl nor any class is patched, and all of verl's policy losses work
on the answer. ``FusedLinearForPPO`` has the call of verl's class of that name. ``compute_policy_loss`` goes further:
verl's vanilla policy loss from hidden states.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import take_apart
from rlhf_kernels.integrations.versions import require

require("verl", "0.9.1", "0.10")


class FusedLinearForPPO(nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``, with ``HeadOptions`` when it is made."""

    def __init__(self, **head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies shaped like ``input_ids``, float32; zero where an id is -100."""
        stats = rk.token_stats(hidden_states, vocab_weights, input_ids, temperature=temperature, **self.head)
        return stats.logp, stats.entropy


def fuse(model: Any, max_bytes: int | None = None) -> None:
    """Let a model answer verl's ``use_fused_kernels`` calls; to be done before it is wrapped.

    These are the calls with a ``temperature``; others go to the model's own forward. Targets are ``shift_labels``, or
    else the rolled ``labels`` or ``input_ids``, so that the last row means nothing, as with verl's own kernels.
    ValueError: the model cannot be taken apart.
    """
    parts, original = take_apart(model), model.forward
    parts = replace(parts, model=original)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, temperature: Any = None, shift_labels: Any = None, **kwargs: Any) -> Any:
        if temperature is None:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        rolled = torch.roll(kwargs["input_ids"] if labels is None else labels, -1, -1)
        targets, hidden = rolled if shift_labels is None else shift_labels, parts.hidden_states(*args, **kwargs)
        head = FusedLinearForPPO(max_bytes=max_bytes, **parts.options)
        output = CausalLMOutput()
        output["log_probs"], output["entropy"] = head(hidden, parts.weight, targets, temperature)
        return output

    model.forward = MethodType(forward, model)


def compute_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None, **head: Any,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """``compute_policy_loss_vanilla`` by ``rk.ppo_loss``; tokens without a gradient skip two of three matrix products.

    Args:
        hidden: [B, T, H] states that predict ``targets`` [B, T]; ``weight`` is [V, H], ``head`` are ``HeadOptions``.
        config: of the actor; its clip ratios and ``global_batch_info`` are read. All else as in verl.

    Raises:
        ValueError: an unknown ``loss_agg_mode``, or what ``rk.ppo_loss`` refuses.
    """
    kinds = dict.fromkeys(("token-mean", "token-sum"), "token_mean") | {"seq-mean-token-mean": "sequence_mean"}
    kinds |= dict.fromkeys(("seq-mean-token-sum", "seq-mean-token-sum-norm"), "sequence_sum")
    if loss_agg_mode not in kinds:
        raise ValueError(f"loss_agg_mode: got {loss_agg_mode!r}, wants one of {', '.join(kinds)}")
    batch, clips = config.global_batch_info, (config.clip_ratio_low, config.clip_ratio_high)
    loss, said = rk.ppo_loss(
        hidden, weight, targets.masked_fill(~response_mask.bool(), -100), old_log_prob, advantages,
        clip=tuple(config.clip_ratio if x is None else x for x in clips),  # type: ignore[arg-type]
        dual_clip=config.get("clip_ratio_c", 3.0), token_weight=rollout_is_weights, reduction=kinds[loss_agg_mode],
        num_tokens=1 if loss_agg_mode == "token-sum" else batch.get("batch_num_tokens"),
        num_sequences=batch.get("global_batch_size"),
        cu_seqlens=torch.arange(0, targets.numel() + 1, targets.shape[1], device=targets.device), **head,
    )  # fmt: skip
    norm = batch.get("loss_scale_factor") or targets.shape[1] if loss_agg_mode.endswith("norm") else 1
    return loss * batch.get("dp_size", 1) / norm, {
        "actor/pg_clipfrac": (said["clipfrac_low"] + said["clipfrac_high"]).item(),
        "actor/ppo_kl": (said["approx_kl"] + 1 - said["ratio"]).item(),  # k3 = k1 + ratio - 1
        "actor/pg_clipfrac_lower": said["clipfrac_dual"].item(),
    }
