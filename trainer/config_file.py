"""Recipes: `--config recipe.yaml` in, `resolved.yaml` out, one flat mapping of option names to values."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RESOLVED = "resolved.yaml"


def load(path: str | Path) -> dict[str, Any]:
    """Reads a recipe; dashes in option names become underscores.

    Args:
        path: A YAML file with one flat mapping; values are scalars or lists of scalars.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, not a mapping, or not flat.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config: {path} does not exist" + (" as a file" if path.exists() else ""))
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ValueError(f"--config: {path} must hold `option: value` lines, got a {type(recipe).__name__}")
    for name, value in recipe.items():
        items = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or any(isinstance(item, dict | list) for item in items):
            raise ValueError(f"--config: {path}: {name!r} must be a plain value or a list of them; recipes are flat")
    return {name.replace("-", "_"): value for name, value in recipe.items()}


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses option names that do not exist, and says which one was probably meant.

    Raises:
        ValueError: One of `names` is not in `known`.

    >>> check_names(["learning_rte"], ["learning_rate", "steps"], "recipe.yaml")
    Traceback (most recent call last):
    ValueError: recipe.yaml: unknown option 'learning_rte'; did you mean 'learning_rate'?
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"want one of {', '.join(known)}"
            raise ValueError(f"{where}: unknown option {name!r}; {hint}")


def as_flags(recipe: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    """The recipe as command-line flags, so that one parser checks both; flags in `given` win and are left out.

    YAML 1.1 reads `1e-4` as text; going through the command line makes it the number it looks like.

    >>> as_flags({"lr": "1e-4", "clip": [0.1, 0.3], "steps": 5, "amp": False}, ["--steps", "9"])
    ['--lr=1e-4', '--clip', '0.1', '0.3', '--no-amp']
    """
    taken = {g.split("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-") for g in given if g[:2] == "--"}
    flags: list[str] = []
    for name, value in recipe.items():
        option = name.replace("_", "-")
        if option in taken:
            continue
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            flags += [f"--{option}", *map(str, value)]
        else:
            flags.append(f"--{option}={value}")
    return flags


def write_resolved(
    out_dir: str | Path, config: Any, comments: Iterable[str] = (), header: Mapping[str, Any] | None = None
) -> Path:
    """Writes every option of a run, defaults included, as a recipe that `--config` reads back, from any folder.

    Args:
        out_dir: The run folder; made if need be.
        config: A flat dataclass.
        comments: Lines for the top of the file: what was run, on which data.
        header: Values before the options: what else the run depends on.

    Returns:
        The path of `resolved.yaml`.
    """
    import yaml

    path = Path(out_dir) / RESOLVED
    path.parent.mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump({**(header or {}), **resolved(config)}, sort_keys=False, allow_unicode=True)
    draft = path.with_name(path.name + ".saving")  # it marks the folder as ours, so there is all of it or nothing
    draft.write_text("".join(f"# {line}\n" for line in comments) + body, encoding="utf-8")
    draft.replace(path)
    return path


def resolved(config: Any) -> dict[str, Any]:
    """Every option of a flat dataclass as YAML holds it; names of files and folders mean the same anywhere."""
    return {f.name: _plain(_absolute(getattr(config, f.name))) for f in dataclasses.fields(config)}


def model_folder(name: str) -> Path | None:
    """The folder that an option means by `name`: that of a model, or the model in a run folder; else None."""
    for folder in (Path(name) / "model", Path(name)):
        if (folder / "config.json").is_file():
            return folder
    return None


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    return {name: _version_of(name) for name in ("rlhf_kernels", "torch", "transformers")}


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _absolute(value: Any) -> Any:
    """Files and models by names that mean the same in every folder."""
    if isinstance(value, Path) or (isinstance(value, str) and model_folder(value)):
        return Path(value).absolute()
    return value


def plain(config: Any) -> dict[str, Any]:
    """A flat dataclass as a mapping of what YAML and JSON can hold.

    Raises:
        TypeError: `config` is not a dataclass instance.
    """
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
