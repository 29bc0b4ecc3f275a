"""What Python hands to a config is what its types say, or one clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trainer import EvalConfig, GRPOConfig, PPOConfig, SFTConfig

GIVEN: dict[str, Any] = {"data": "d.jsonl", "reward": "exact_answer"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("precision", "bf16", "precision: got 'bf16', want float32 or bfloat16"),
        ("kl_in", "losses", "kl_in: got 'losses', want reward or loss"),
        ("schedule", "cos", "schedule: got 'cos', want constant, linear, cosine or auto"),
        ("steps", 1.5, "steps: got 1.5, want a whole number"),
        ("steps", True, "steps: got True, want a whole number"),
        ("lr", "fast", "lr: got 'fast', want a number or auto"),
        ("kl_coef", "0.04", "kl_coef: got '0.04', want a number"),
        ("clip", 0.2, "clip: got 0.2, want 2 of a number"),
        ("clip", (0.2,), "clip: got (0.2,), want 2 of a number"),
        ("reward", len, "reward: got <built-in function len>, want the name of a function as text, module:function"),
        ("log_to", "wandb", "log_to: got 'wandb', want several of tensorboard or wandb or trackio"),
        ("quiet", 1, "quiet: got 1, want True or False"),
    ],
)
def test_what_has_no_meaning_is_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GRPOConfig(**GIVEN | {option: value})


def test_numbers_of_numpy_and_lists_are_welcome() -> None:
    numpy = pytest.importorskip("numpy")
    cfg = PPOConfig(
        **GIVEN | {"lr": numpy.float32(0.5), "steps": numpy.int64(3), "clip": [0.1, 0.3], "value_clip": None}
    )
    assert (cfg.lr, cfg.steps, list(cfg.clip), cfg.value_clip) == (0.5, 3, [0.1, 0.3], None)


def test_every_default_is_what_its_type_says() -> None:
    PPOConfig(**GIVEN)
    SFTConfig(data=Path("d.jsonl"))
    EvalConfig(model="m", base="b", data=Path("d.jsonl"), judge="exact_answer")
