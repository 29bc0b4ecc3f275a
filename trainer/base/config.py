"""Recipes: `--config recipe.yaml` in, `resolved.yaml` out, one flat mapping of option names to values."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.base.address import redacted
from trainer.base.console import visible
from trainer.base.files import write_whole
from trainer.base.paths import model_folder

RESOLVED = "resolved.yaml"
LARGEST, MOST_NODES = 1 << 18, 10_000  # A YAML file may have so many bytes and values.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NUMBER = re.compile(r"-(?:[\d.]+(?:[eE][-+]?\d+)?|inf|nan)")


def load(path: str | Path) -> dict[str, Any]:
    """Reads a recipe; dashes in option names become underscores.

    Args:
        path: A YAML file with one flat mapping; values are scalars or lists of scalars.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, not a mapping, or not flat.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config: {path} does not exist" + (" as a file" if path.exists() else ""))
    recipe = read_yaml(path, "--config: ")
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ValueError(f"--config: {path} must hold `option: value` lines, got a {type(recipe).__name__}")
    for name, value in recipe.items():
        items = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or any(isinstance(item, dict | list) for item in items):
            raise ValueError(f"--config: {path}: {name!r} must be a plain value or a list of them; recipes are flat")
    return {name.replace("-", "_"): value for name, value in recipe.items()}


def read_yaml(path: Path, lead: str = "") -> Any:
    """What a YAML file holds: plain values, lists and mappings, never objects of Python.

    Args:
        path: A file.
        lead: Of messages.

    Raises:
        ValueError: It is not YAML, a name stands twice in a mapping, a value holds control characters, or aliases blow
            it up to more than any recipe has.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """YAML would take the last of two."""
            # `<<` may stand there several times.
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            keys = [self.construct_object(key, deep=True) for key in own]
            times = Counter(key for key in keys if isinstance(key, Hashable))
            if twice := [key for key in times if times[key] > 1]:
                lines = [key.start_mark.line + 1 for key in own if key.value == str(twice[0])]
                raise Refused(f"{twice[0]!r} stands twice, the second time in line {lines[-1]}")
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            """What steers a terminal is in no name; what turns lines around is in names of half the world."""
            if CONTROL.search(str(node.value)):
                raise Refused(f"line {node.start_mark.line + 1} holds control characters")
            return super().construct_scalar(node)

    try:
        if path.stat().st_size > LARGEST:
            raise Refused(f"has more than {LARGEST >> 10} KiB, want a recipe")
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if _nodes(node, {}) > MOST_NODES:
            raise Refused(f"has more than {MOST_NODES} values, counting aliases")
        return None if node is None else loader.construct_document(node)
    except Refused as error:
        raise ValueError(f"{lead}{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # The 31st of February is a ValueError.
        raise ValueError(f"{lead}{path} is not valid YAML: {' '.join(str(error).split())}") from None


class Refused(ValueError):
    """YAML, but nothing that we take."""


def _nodes(node: Any, known: dict[int, int]) -> int:
    """Values in a node, each alias counted as often as it stands there; one that holds itself is endless."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1
        inside = node.value if node is not None and isinstance(node.value, list) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def check_names(names: Iterable[str], known: Iterable[str], where: str, what: str = "option") -> None:
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
            raise ValueError(f"{where}{': ' * bool(where)}unknown {what} {name!r}; {hint}")


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
            if bad := [x for x in map(str, value) if x.startswith("-") and not NUMBER.fullmatch(x)]:
                raise ValueError(f"{name}: got {bad[0]!r} in a list, want values that do not look like options")
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
    return write_whole(path, (comment(comments) + body).encode())  # It marks the folder as ours.


def comment(lines: Iterable[str]) -> str:
    """Lines for the top of a YAML file, without secrets; a name of a file may hold the end of a line."""
    shown = (visible(redacted(line)).replace("\n", "\\n") for line in lines)
    return "".join(f"# {line}\n" for line in shown)


def resolved(config: Any) -> dict[str, Any]:
    """Every option of a flat dataclass as YAML holds it; names of files and folders mean the same anywhere."""
    return {f.name: _plain(_absolute(getattr(config, f.name))) for f in dataclasses.fields(config)}


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
    """A flat dataclass as a mapping of what YAML and JSON can hold, without secrets in addresses.

    Raises:
        TypeError: `config` is not a dataclass instance.
    """
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return redacted(value)
    return value if isinstance(value, bool | int | float | None) else str(value)


def version() -> str:
    """Of the packages that decide what a run computes, in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())
