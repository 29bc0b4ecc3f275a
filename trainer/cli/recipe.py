"""Recipes of several stages: which there are, what they are called, and what the `${names}` in them stand for.

Nothing heavy is imported here: a typing error is to be told before torch is loaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.base import config as config_file
from trainer.base.address import VARIABLE
from trainer.run import folder as run_folder

SHIPPED = Path(__file__).parents[1] / "recipes"
KEYS = ("vars", "threads", "stages")
WRITTEN = ("stage", "inputs")  # what a run adds when it writes its recipe down
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
REFERENCE = re.compile(r"\$\{([^}]*)\}")
LONGEST = 1 << 13  # Variables may be made of variables: so many letters of them fit into one value.


class Step(NamedTuple):
    """One stage of a recipe."""

    name: str
    stage: str
    options: dict[str, Any]  # as `--config` would read them, with `out`


class Recipe(NamedTuple):
    """A recipe for one run folder."""

    source: Path
    threads: Any
    steps: list[Step]
    inputs: dict[str, str]  # sha256 of data files; empty in a recipe that no run has written
    variables: dict[str, Any]


class Work(NamedTuple):
    """A stage that is ready to run."""

    name: str
    stage: str
    run: Any
    config: Any

    @property
    def done(self) -> bool:
        return (self.config.out / run_folder.SUMMARY).exists()


def find(name: str) -> Path:
    """A recipe's file: a path, or the name of one that is shipped.

    Raises:
        FileNotFoundError: It is neither.
    """
    path, shipped = Path(name), SHIPPED / f"{name}.yaml"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"want a file, or one of {', '.join(names())}"
    raise FileNotFoundError(f"recipe: {name} does not exist; {hint}")


def names() -> list[str]:
    """Recipes that are shipped."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read(path: Path, out: Path, given: Mapping[str, Any], known: Collection[str]) -> Recipe:
    """Reads a recipe and puts in what its `${names}` stand for.

    Args:
        path: A YAML file with `stages`, a mapping of names to options in the order of the work, and perhaps `vars` and
            `threads`. What a stage does is its option `stage`, or else its name. A variable may be made of those above
            it.
        out: The run folder; `${sft}` is the folder `sft` in it, for every stage after that one.
        given: Variables that win over `vars`.
        known: Stages that there are.

    Raises:
        ValueError: The file is not such a recipe; a stage, a variable or a reference does not exist.
    """
    whole = _yaml(path)
    config_file.check_names(whole, (*KEYS, *WRITTEN), str(path))
    variables = _mapping(whole.get("vars"), f"{path}: vars")
    if odd := [name for name in variables if not isinstance(name, str)]:
        raise ValueError(f"{path}: vars: {odd[0]!r} is no name, want text")
    config_file.check_names(given, variables, "--set")
    variables |= given
    stages = _mapping(whole.get("stages"), f"{path}: stages")
    if not stages:
        raise ValueError(f"{path}: stages: got none, want `name: options` for at least one")
    if both := sorted(stages.keys() & variables.keys()):
        raise ValueError(f"{path}: {both[0]!r} is a variable and a stage, want different names")
    meaning: dict[str, Any] = {}
    for name, value in variables.items():
        meaning[name] = _filled(value, meaning, stages, f"{path}: vars: {name}")
    steps = []
    for name, options in stages.items():
        where = f"{path}: {name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{where}: want a name of letters, digits, _ and -, it names a folder")
        options = {str(k).replace("-", "_"): v for k, v in _mapping(options, where).items()}
        stage = str(options.pop("stage", name))
        config_file.check_names([stage], known, where, "stage")
        if "out" in options or "threads" in options:
            raise ValueError(f"{where}: out and threads are those of the whole pipeline, leave them out")
        filled = {k: _filled(v, meaning, stages, f"{where}: {k}") for k, v in options.items()}
        steps.append(Step(name, stage, filled | {"out": str(out / name)}))
        meaning[name] = str(out / name)
    return Recipe(path, whole.get("threads"), steps, _mapping(whole.get("inputs"), "inputs"), variables)


def portable(value: Any, earlier: Mapping[str, str]) -> Any:
    """The opposite of filling in: folders of earlier stages become `${names}`, so that a run folder can be moved.

    >>> portable(["runs/a/sft", "runs/a/sft2", 3], {"sft": "runs/a/sft"})
    ['${sft}', 'runs/a/sft2', 3]
    """
    if isinstance(value, list):
        return [portable(item, earlier) for item in value]
    if isinstance(value, str):
        for name, folder in earlier.items():
            value = re.sub(rf"{re.escape(folder)}(?![\w.-])", lambda _, name=name: f"${{{name}}}", value)
    return value


def _filled(value: Any, meaning: Mapping[str, Any], stages: Collection[str], where: str) -> Any:
    if isinstance(value, list):
        value = [item if isinstance(item, list | dict) else _filled(item, meaning, stages, where) for item in value]
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, list | dict) for item in value)):
        raise ValueError(f"{where} must be a plain value or a list of them")
    if not isinstance(value, str):
        return value
    size = 0

    def meant(match: re.Match[str]) -> Any:
        name = match[1]
        if name in meaning and meaning[name] is None:
            raise ValueError(f"{where}: the variable {name} has no value; give it one with --set {name}=...")
        if name in meaning:
            return meaning[name]
        if name in stages:
            raise ValueError(f"{where}: ${{{name}}} is no earlier stage, and cannot be used here")
        if VARIABLE.fullmatch(match[0]):
            return match[0]  # It is one of the environment, which whoever asks that address looks up.
        near = difflib.get_close_matches(name, meaning, n=1)
        hint = f"did you mean ${{{near[0]}}}?" if near else f"want one of {', '.join(meaning) or 'nothing, yet'}"
        raise ValueError(f"{where}: ${{{name}}} is neither a variable nor an earlier stage; {hint}")

    def written(match: re.Match[str]) -> str:
        nonlocal size
        size += len(part := str(meant(match)))
        if size > LONGEST:
            raise ValueError(f"{where}: what its variables stand for has more than {LONGEST >> 10} KiB, want a value")
        return part

    alone = REFERENCE.fullmatch(value)
    return meant(alone) if alone else REFERENCE.sub(written, value)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: want `name: value` lines, got {value!r:.60}")
    return dict(value)


def _yaml(path: Path) -> dict[Any, Any]:
    """One mapping."""
    whole = config_file.read_yaml(path)
    if not isinstance(whole, dict) or "stages" not in whole:
        raise ValueError(f"{path} is no recipe of several stages: want a mapping with `stages:`")
    return whole
