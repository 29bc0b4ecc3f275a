"""How the model of a stage reads conversations, before the model itself is loaded."""

from __future__ import annotations

from typing import Any

from trainer.base.paths import resolve
from trainer.data.chat import TINY, ChatTemplate, Format, render_of
from trainer.data.prompt import Turns
from trainer.models.files import tokenizer_of


def render_for(model: str, prompt_format: Format = "auto", date: str | None = None) -> ChatTemplate | Turns:
    """The same by a model's name, before the model itself is loaded.

    Args:
        model: A run folder, a local directory, a hub id, or "tiny", which is trained on plain turns.
        prompt_format: As in ``render_of``.
        date: As in ``render_of``.
    """
    return render_of(None if model == TINY else tokenizer_of(resolve(model)), prompt_format, date)


def render_as(cfg: Any, model: str | None = None) -> ChatTemplate | Turns:
    """The same by the options of a stage, of which ``model`` is another one."""
    return render_for(model or cfg.model, cfg.prompt_format, cfg.template_date)
