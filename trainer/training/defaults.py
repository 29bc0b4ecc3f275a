"""What an option is where nobody says it: that depends on whether the model has learnt something before.

A small model from scratch learns with steps that would ruin a pretrained one within a rollout. So these options are
``auto`` until a stage begins, and then become what stands in the table here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from trainer.base.paths import model_folder
from trainer.base.threads import TINY
from trainer.training.options import AUTO

C = TypeVar("C")
SMALL = 20_000_000  # A model with fewer parameters was hardly pretrained: it is ``tiny``, or descends from it.
WARM = 10  # The warm-up of a pretrained model takes no more than one in so many of its optimizer steps.

TABLE: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "StageConfig": {"lr": (1e-3, 1e-5), "warmup_steps": (20, 20), "schedule": ("cosine", "cosine")},
    "PreferenceConfig": {"lr": (5e-5, 1e-6)},
    "ORPOConfig": {"lr": (5e-5, 5e-6)},
    "RewardOptions": {"max_new_tokens": (64, 256)},
    "RLConfig": {
        "lr": (3e-4, 1e-5), "warmup_steps": (10, 10), "schedule": ("cosine", "constant"),
        "epochs": (2, 1), "minibatches": (2, 1),
    },
    "PPOConfig": {"value_lr": (1e-3, 1e-5)},
    "EvalConfig": {"max_new_tokens": (128, 256)},
}  # fmt: skip
"""Class of a config to its options, each for a small and for a pretrained model; a class has those of its bases."""


def open_in(cfg: Any) -> list[str]:
    """Options of a config that wait for its model."""
    return [name for name in options_of(type(cfg)) if getattr(cfg, name) == AUTO]


def decided(cfg: C) -> C:
    """The same config with a value in the place of every ``auto``; what somebody gave stays as it is.

    Example:
        >>> from trainer.stages.rl.grpo import GRPOConfig
        >>> cfg = decided(GRPOConfig(data="prompts.jsonl", reward="exact_answer", lr=1e-4))  # type: ignore[arg-type]
        >>> cfg.lr, cfg.epochs, cfg.max_new_tokens
        (0.0001, 2, 64)
    """
    options = options_of(type(cfg))
    names = open_in(cfg)
    if not names:
        return cfg
    pretrained = is_pretrained(parameters(cfg.model))  # type: ignore[attr-defined]
    chosen = {name: options[name][pretrained] for name in names}
    longest = cfg.max_length  # type: ignore[attr-defined]
    if chosen.get("max_new_tokens", 0) >= longest:  # A prompt wants room, too.
        chosen["max_new_tokens"] = max(longest // 2, 1)
    if pretrained and "warmup_steps" in chosen:
        per_step = (chosen.get(name, getattr(cfg, name, 1)) for name in ("epochs", "minibatches"))
        updates = cfg.steps * math.prod(per_step)  # type: ignore[attr-defined]
        chosen["warmup_steps"] = min(chosen["warmup_steps"], max(updates // WARM, 1))
    return dataclasses.replace(cfg, **chosen)  # type: ignore[type-var]


def told(given: Any) -> str:
    """One line about what was decided for a config; none where it left nothing open."""
    names = open_in(given)
    if not names:
        return ""
    cfg = decided(given)
    count = parameters(given.model)
    kind = "a pretrained model" if is_pretrained(count) else "a small model from scratch"
    size = f" ({count / 1e6:.3g} million parameters)" if count else ""
    values = " ".join(f"--{name.replace('_', '-')} {getattr(cfg, name)}" for name in names)
    return f"Chosen for {kind}{size}: {values}. Set these options to override."


def options_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """Options of a class of configs that depend on the model, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in reversed(kind.__mro__):
        found |= TABLE.get(base.__name__, {})
    return found


def is_pretrained(count: int | None) -> bool:
    """What cannot be looked at is somebody's, and so it is handled with care."""
    return count is None or count >= SMALL


def parameters(model: str) -> int | None:
    """How many numbers the weights of a model hold, by their headers; None for a model of the hub, which nobody asks
    here, and for weights that cannot be read: what loads them says why.
    """
    if model == TINY:
        return 0
    folder = model_folder(model)
    try:
        files = [] if folder is None else sorted(folder.glob("model*.safetensors"))
        return sum(map(_numbers_in, files)) if files else None
    except (OSError, SafetensorError):
        return None


def _numbers_in(file: Path) -> int:
    with safe_open(file, "pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
