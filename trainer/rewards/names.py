"""What the options ``--reward``, ``--gold-reward`` and ``--judge`` name, read without loading a model."""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.base import address, permission
from trainer.base.address import is_address, redacted
from trainer.base.paths import model_folder
from trainer.rewards.exact_answer import exact_answer

ITEM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sources>.+?)(?:@(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?))?")


class Aspect(NamedTuple):
    """What a response can be good at."""

    name: str
    weight: float
    sources: tuple[str, ...]  # more than one is an ensemble


def aspects_of(reward: str | Sequence[str]) -> list[Aspect]:
    """Reads ``[NAME=]SOURCE[,SOURCE...][@WEIGHT]``, once or several times.

    Raises:
        ValueError: Nothing is given, a weight is not a number, a source is empty, or two aspects share a name.

    Example:
        >>> aspects_of(["runs/a,runs/b", "brief=my:brief@0.5"])[1]
        Aspect(name='brief', weight=0.5, sources=('my:brief',))
    """
    items = [reward] if isinstance(reward, str) else list(reward)
    if not items:
        raise ValueError("reward: want at least one")
    found = []
    for i, item in enumerate(items):
        if Path(item).exists():  # a folder may be called anything
            found.append(Aspect("reward" if len(items) == 1 else f"reward_{i + 1}", 1.0, (item,)))
            continue
        match = ITEM.fullmatch(item.strip())
        sources = tuple(match["sources"].split(",")) if match else ()
        if match is None or not all(sources):
            raise ValueError(f"reward: got {redacted(item)!r}, want [NAME=]SOURCE[,SOURCE...][@WEIGHT]")
        try:
            weight = float(match["weight"] or 1.0)
        except ValueError:
            got = f"got the weight {match['weight']!r} in {redacted(item)!r}"
            raise ValueError(f"reward: {got}, want a number") from None
        name = match["name"] or ("reward" if len(items) == 1 else f"reward_{i + 1}")
        found.append(Aspect(name, weight, sources))
    names = [a.name for a in found]
    if len(set(names)) < len(names):
        raise ValueError(f"reward: got the names {', '.join(names)}, want each once")
    return found


def sources_of(config: Any) -> list[tuple[str, str]]:
    """Every reward and judge that the options of a stage name, each with its option."""
    found: list[tuple[str, str]] = []
    for option in ("reward", "gold_reward", "judge"):
        if value := getattr(config, option, None):
            names = [s for a in aspects_of(value) for s in a.sources] if option == "reward" else [value]
            found += [(option, name) for name in names]
    return found


def only_models(reward: str | Sequence[str]) -> bool:
    """Whether nothing but reward models on this disk gives scores."""
    return all(is_model(source) for aspect in aspects_of(reward) for source in aspect.sources)


def check_sources(config: Any) -> None:
    """Refuses rewards and judges that cannot be asked; imports functions, where that is allowed.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    for option, name in sources_of(config):
        check_source(name, option, load=True)


RewardFunction = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]


BUILT_IN: dict[str, RewardFunction] = {"exact_answer": exact_answer}


def is_model(name: str) -> bool:
    """Whether a name stands for a reward model on this disk."""
    return model_folder(name) is not None


def function_of(name: str, option: str = "reward") -> Callable[..., Any]:
    """The function of this module, ``module:function`` or ``compare:module:function`` that a name stands for.

    Raises:
        ValueError: There is none, or its module may not be imported (``trainer.base.permission``).
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, found = permission.function(name, option)
    permission.look_here()
    file = permission.source_of(module)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        if file is None:
            raise permission.none_such(name, option, error) from error
        what = " ".join(f"{type(error).__name__}: {error}".split()) + _line_in(file, error)
        raise ValueError(f"{option}: got {name!r}, which is in {file}, but to import that fails: {what}") from error
    try:
        return getattr(loaded, found)
    except AttributeError as error:
        raise permission.none_such(name, option, error) from error


def _line_in(file: Path, error: BaseException) -> str:
    """Where in the user's own module something failed, if it did not fail before its first line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" (line {lines[-1]})" if lines else ""


def check_source(name: str, option: str = "reward", *, load: bool = False) -> None:
    """Refuses what is no reward, an address that cannot be asked, and code that is not allowed.

    Args:
        name: As ``reward_from`` takes it.
        option: For the message.
        load: Import a function's module, which runs it; otherwise it is only read.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    if is_address(name):
        address.read(name)
    elif not is_model(name) and name not in BUILT_IN:
        function_of(name, option) if load else permission.check_function(name, option)
