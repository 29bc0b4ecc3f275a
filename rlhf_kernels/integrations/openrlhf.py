"""OpenRLHF's actor and losses with this package's head. For openrlhf>=0.11.2,<0.12.

``action_log_probs`` is what OpenRLHF's actor computes, without logits; any loss of OpenRLHF can take it from there.
``PolicyLoss`` and ``DPOLoss`` take ``hidden`` [B, T, H], ``weight`` [V, H] and ``targets`` [B, T] where OpenRLHF's
classes of these names take log-probabilities, and ``**head`` (see ``HeadOptions``) behind all the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import take_apart
from rlhf_kernels.integrations.versions import require

require("openrlhf", "0.11.2", "0.12")


def action_log_probs(
    actor: Any, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """The results of ``actor(sequences, action_mask, attention_mask, return_output=True, return_entropy=True)``.

    Args:
        actor: ``openrlhf.models.Actor``, without packed samples.
        sequences: [B, T] token ids, of which the last A are actions; ``action_mask`` is [B, A].
        attention_mask: [B, T]; ``inputs`` are whatever else the model takes.

    Returns:
        Log-probabilities and entropies of the policy at its temperature, [B, A] float32, zero where the mask is.

    Raises:
        ValueError: ``packing_samples`` is on, or the model cannot be taken apart.
    """
    if getattr(actor, "packing_samples", False):
        raise ValueError("packing_samples: got True, wants False: rows are sequences here")
    own, actions = vars(actor), action_mask.shape[1]
    parts = own["_parts"] = own.get("_parts") or take_apart(getattr(actor.model, "module", actor.model))
    if not getattr(actor, "is_vlm", False):
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    hidden = parts.hidden_states(sequences, attention_mask=attention_mask, **inputs)[:, -actions - 1 : -1]
    targets = sequences[:, -actions:].masked_fill(~action_mask.bool(), -100)
    stats = rk.token_stats(hidden, parts.weight, targets, temperature=actor.temperature, **parts.options)
    return stats.logp, stats.entropy


class PolicyLoss(nn.Module):
    """``openrlhf.models.PolicyLoss`` by ``rk.ppo_loss``; tokens without a gradient skip two of three matrix products.
    ValueError for another ``policy_loss_type`` or ``is_correction_level`` than these: they need OpenRLHF's own class.
    """

    def __init__(
        self, clip_eps_low: float = 0.2, clip_eps_high: float = 0.2, dual_clip: float | None = None,
        token_level_loss: bool = True, policy_loss_type: str = "ppo", is_correction_level: str = "off",
    ) -> None:  # fmt: skip
        super().__init__()
        if policy_loss_type != "ppo":
            raise ValueError(f"policy_loss_type: got {policy_loss_type!r}, wants 'ppo'")
        if is_correction_level != "off":
            raise ValueError(f"is_correction_level: got {is_correction_level!r}, wants 'off'")
        self.clip, self.dual_clip, self.token_level_loss = (clip_eps_low, clip_eps_high), dual_clip, token_level_loss

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, old_log_probs: Tensor, advantages: Tensor,
        action_mask: Tensor, rollout_log_probs: Any = None, dp_size: int = 1, batch_num_tokens: Any = None,
        global_batch_size: Any = None, **head: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:  # fmt: skip
        how: dict[str, Any] = {"num_tokens": batch_num_tokens, "clip": self.clip, "dual_clip": self.dual_clip, **head}
        if not self.token_level_loss:
            ends = torch.arange(0, targets.numel() + 1, targets.shape[1], device=targets.device)
            how |= {"reduction": "sequence_mean", "num_sequences": global_batch_size, "cu_seqlens": ends}
        scale = 1 if (batch_num_tokens if self.token_level_loss else global_batch_size) is None else dp_size
        targets = targets.masked_fill(~action_mask.bool(), -100)
        loss, said = rk.ppo_loss(hidden, weight, targets, old_log_probs, advantages, **how)
        ppo_kl = said["approx_kl"] + 1 - said["ratio"]  # k3 = k1 + ratio - 1
        return loss * scale, said["clipfrac_low"] + said["clipfrac_high"], ppo_kl, None, None


class DPOLoss(nn.Module):
    """``openrlhf.models.DPOLoss`` of [2B, T] targets, B chosen and then B rejected; -100 is prompt and padding."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor, **head: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        logps = rk.token_stats(hidden, weight, targets, **head).logp.sum(-1)
        chosen, rejected = (logps - torch.cat([reference_chosen_logps, reference_rejected_logps])).chunk(2)
        gain, eps = self.beta * (chosen - rejected), self.label_smoothing
        dpo = -(1 - eps) * F.logsigmoid(gain) - eps * F.logsigmoid(-gain)
        loss = (gain / self.beta - 1 / (2 * self.beta)).square() if self.ipo else dpo
        return loss.mean(), self.beta * chosen.detach(), self.beta * rejected.detach()
