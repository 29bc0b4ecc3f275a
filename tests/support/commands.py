"""The short runs of ``runs`` as command lines."""

from __future__ import annotations

from pathlib import Path

from tests.support.runs import config
from trainer.base.config import as_flags, plain

NAMES = {"shared": "ppo"}  # what the stage is called on the command line


def command(stage: str, path: Path, out: Path, *more: str) -> list[str]:
    """Of a short run over the world in ``path``."""
    options = {k: v for k, v in plain(config(stage, path, out)).items() if v is not None}
    return [NAMES.get(stage, stage), *as_flags(options, []), *more]
