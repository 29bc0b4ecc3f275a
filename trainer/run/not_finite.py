"""What is left behind when losses or gradients stop being finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.run.durable import write_json, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE = "not_finite"  # the folder in the run folder
BATCH = ("about.json", "batch.safetensors")  # These lie in it.


class NotFinite(FloatingPointError):
    """Several steps in a row had to be skipped."""


def save_batch(folder: Path, batches: Sequence[Any], about: Mapping[str, Any]) -> Path:
    """Saves the micro-batches of a step for inspection.

    Args:
        folder: Gets ``about.json`` and ``batch.safetensors``, in place of those of an earlier run.
        batches: Dataclasses of tensors, nested as they like; other fields go to ``about.json``.
        about: What else is known; numbers that are not finite become text.

    Returns:
        The folder.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for i, batch in enumerate(batches):
        _flatten(f"{i}", batch, tensors, rest)
    about_file, batch_file = BATCH
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / batch_file, tensors)
    write_json(folder / about_file, _jsonable({**about, "micro_batches": len(batches), "fields": rest}))
    return folder


def _flatten(name: str, value: Any, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    import torch  # The command line knows the names in here before it loads torch.

    if isinstance(value, torch.Tensor):
        tensors[name] = value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _flatten(f"{name}.{field.name}", getattr(value, field.name), tensors, rest)
    elif value is not None:
        rest[name] = value


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
