"""TRL's trainers with this package's head: ``FusedGRPOTrainer`` and ``FusedDPOTrainer``. For trl>=1.16,<1.17.

TRL asks its model for statistics of each token (``model(..., labels=labels, fused_lm_head=True)``) and builds every
loss and metric from them. The trainers here answer by ``token_stats`` and leave all else to TRL, so each of its loss
types keeps its mathematics and its logs. Prompt tokens and padding never meet the head.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from types import MethodType
from typing import Any

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import Parts, take_apart
from rlhf_kernels.integrations.versions import require

require("trl", "1.16", "1.17")

from trl import DPOTrainer, GRPOTrainer  # noqa: E402  # pyright: ignore
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402  # pyright: ignore[reportMissingImports]

REFUSED = {
    "use_weighting": "the sum of squared probabilities is no statistic of this head",
    "use_liger_kernel": "it has a head of its own",
    "cast_lm_head_to_fp32": "logits are not rounded here, whatever the dtype of the weights",
    "deepspeed": "a head that is partitioned cannot be read",
    "fsdp": "a head that is sharded cannot be read",
    "parallelism_config": "sequences must be whole on one rank",
}


class FusedHead:
    """What both trainers add to TRL's: all of TRL's arguments, and one more.

    Args:
        max_bytes: most scratch of the head, in bytes; None is the backend's default.

    Raises:
        ValueError: an option or a model that this head cannot serve, by name, before any training.
    """

    def __init__(self: Any, *args: Any, max_bytes: int | None = None, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        for name, why in REFUSED.items():
            self._refuse(name, getattr(given.get("args"), name, None), why)
        super().__init__(*args, **kwargs)
        self._refuse("deepspeed", self.is_deepspeed_enabled, REFUSED["deepspeed"])
        self._refuse("fsdp", self.is_fsdp_enabled, REFUSED["fsdp"])
        self._refuse("router_aux_loss_coef", self.aux_loss_enabled and self.router_aux_loss_coef, "no router is read")
        for model in (self.model, self.ref_model):
            if model is not None:
                bare = self.accelerator.unwrap_model(model)
                bare = bare.get_base_model() if hasattr(bare, "peft_config") else bare
                with self.accelerator.autocast():
                    parts = take_apart(bare)
                options = {"temperature": getattr(self, "temperature", 1.0), "max_bytes": max_bytes}
                bare.forward = MethodType(_forward(parts, options, self.accelerator.autocast), bare)

    def _refuse(self, name: str, value: Any, why: str) -> None:
        if value:
            raise ValueError(f"{name}: got {value}, wants it off with {type(self).__name__}: {why}")


def _forward(parts: Parts, options: dict[str, Any], autocast: Any) -> Any:
    """A forward that answers TRL's question, and passes on whatever else is asked."""
    original, bare = parts.model.forward, type(parts.model)
    parts = replace(parts, model=original)  # not model(...): accelerate's autocast around it must not be entered twice

    @functools.wraps(bare.forward)  # generate looks at the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        with autocast():
            hidden = parts.hidden_states(*args, **{**kwargs, "use_cache": False})[:, :-1]
            targets = labels[:, 1:]
            stats: Any = rk.token_stats(hidden, parts.weight, targets, **options, **parts.options)
        return FusedCausalLMOutput(
            log_probs=stats.logp,
            entropy=stats.entropy,
            mean_logits=stats.mean_logit,
            is_top1=stats.top1.bool(),
            label_mask=targets != -100,
        )

    return forward


class FusedGRPOTrainer(FusedHead, GRPOTrainer):  # pyright: ignore[reportGeneralTypeIssues]
    """``trl.GRPOTrainer``, and ``max_bytes``; every loss type, with entropy, KL and clipping logged as TRL does."""


class FusedDPOTrainer(FusedHead, DPOTrainer):  # pyright: ignore[reportGeneralTypeIssues]
    """``trl.DPOTrainer``, and ``max_bytes``; every loss type but with ``use_weighting``."""
