"""Options of every stage that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trainer.base.typed_options import check_types, settle
from trainer.data.chat import Format, settle_date

T = TypeVar("T")
AUTO: Any = "auto"

if TYPE_CHECKING:  # What a stage works with is always decided, and so a plain number.
    from typing import Annotated

    Auto = Annotated[T, "or auto"]
else:

    class Auto:
        """A value, or ``auto``."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Options of every stage."""

    model: str = "tiny"
    """A local directory or hub id of a causal language model, or "tiny": a small Llama from scratch."""
    data: Path
    """Training data, .jsonl, .jsonl.gz or parquet."""
    out: Path = Path("runs/latest")
    """Folder for the trained model, the metrics and the report."""
    seed: int = 0
    """Two runs with one seed on one machine give the same bits."""
    steps: int = 300
    """Optimizer steps; in ppo, rollouts."""
    batch_size: int = 64
    """Records per step: demonstrations, groups of ranked responses, or prompts."""
    max_tokens: int = 8192
    """Tokens per micro-batch. It bounds memory and does not change the result, but for a router's balancing loss."""
    max_length: int = 1024
    """Longest sequence; longer prompts are cut on the left, longer responses on the right."""
    prompt_format: Format = "auto"
    """How to read a prompt that is plain text. auto: as one message of the user if the model has a chat template, else
    as it stands. chat: as a message of the user, and a model without a template is refused. raw: as it stands, for
    prompts that already hold a template's markup."""
    template_date: str | None = None
    """Date that a chat template puts into prompts (YYYY-MM-DD), where it puts one; by default the day a run begins."""
    lr: Auto[float] = AUTO
    """Peak learning rate. Here and below, "auto" is what suits the model, small and from scratch or pretrained; a run
    begins by saying what it became."""
    warmup_steps: Auto[int] = AUTO
    """Steps over which the learning rate rises from zero."""
    schedule: Auto[Literal["constant", "linear", "cosine"]] = AUTO
    """How the learning rate falls after the warm-up: not at all, or to a tenth of its peak."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices only."""
    adam_eps: float = 1e-8
    """Added to the denominator of Adam."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto is the GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights and optimizer stay in float32."""
    save_every: int | None = None
    """Steps between checkpoints; None saves every ten minutes. A run that is told to stop saves in any case."""
    keep_last: int = 2
    """Checkpoints that stay, each as large as the models with their optimizers; none stays once the run is finished."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the metrics of every step go beside metrics.jsonl: an event file in the run folder, or a run of W&B or
    Trackio. A resumed run goes on there."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        settle(self)
        settle_date(self)
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class TokenConfig(StageConfig):
    """Options of every stage whose loss meets the language-model head."""

    tolerance: float | None = None
    """Share of their gradient that logits may lose for speed, such as 0.0002; by default nothing is left out."""


def check_options(cfg: StageConfig) -> None:
    """Refuses numbers without a meaning, once they are decided.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    for name in ("steps", "batch_size", "max_tokens", "max_length", "keep_last"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want at least 1")
    if cfg.save_every is not None and cfg.save_every < 1:
        raise ValueError(f"save_every: got {cfg.save_every}, want at least 1, or None")
    if not (cfg.lr > 0 and math.isfinite(cfg.lr)):
        raise ValueError(f"lr: got {cfg.lr}, want a positive number")
    tolerance = getattr(cfg, "tolerance", None)
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance: got {tolerance}, want a number above 0 and below 1, or None")
    if not cfg.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: got {cfg.max_grad_norm}, want a positive number, or inf for no limit")
