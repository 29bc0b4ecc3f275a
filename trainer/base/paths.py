"""The folder of a model by the names that people give it."""

from __future__ import annotations

from pathlib import Path


def model_folder(name: str) -> Path | None:
    """The folder that an option means by `name`: that of a model, or the model in a run folder; else None."""
    for folder in (Path(name) / "model", Path(name)):
        if (folder / "config.json").is_file():
            return folder
    return None


def resolve(path: str) -> str:
    """A run folder stands for the model in it; anything else for itself."""
    folder = model_folder(path)
    return path if folder is None or folder == Path(path) else str(folder)
