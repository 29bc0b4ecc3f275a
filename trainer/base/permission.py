"""Whose Python a run may import: modules that were named on the command line, and no others.

A recipe, or the run folder that is resumed, may be somebody else's. A reward in it such as ``module:function`` is
code, and stays a name until the user names its module too, as ``--reward module:function`` or ``--allow-code module``.
Nothing here imports anything of the user's: modules are looked up as files, and read.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import symtable
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import all_suffixes
from pathlib import Path

FLAG = "--allow-code"
NAME = r"[^\W\d]\w*"
FUNCTION = re.compile(rf"(?:compare:)?(?P<module>{NAME}(?:\.{NAME})*):(?P<function>{NAME})")
OTHERS = "compare:module:function or an http address"
OURS = ("trainer.demo.task:hidden_judge",)  # This is the gold reward of the demo.
MOVED = {"trainer.demo_task:hidden_judge": OURS[0]}  # Runs of earlier versions have the old name in their options.
SEVERAL = ("--reward",)
SPEAKING = (*SEVERAL, "--gold-reward", "--judge", "--set")
_allowed: frozenset[str] | None = None  # None: whoever calls from Python has the module already


@contextmanager
def only(modules: Iterable[str]) -> Iterator[None]:
    """Within this, functions come from these modules, and from what is in them where they are packages."""
    global _allowed
    before, _allowed = _allowed, frozenset(modules)
    try:
        yield
    finally:
        _allowed = before


def add_option(parser: argparse.ArgumentParser) -> None:
    """Lets a parser know the flag; ``named`` has read it already."""
    text = "a Python module that rewards and judges of a recipe or run folder may come from"
    parser.add_argument(FLAG, action="append", default=[], metavar="MODULE", help=text)


def named(argv: Sequence[str]) -> set[str]:
    """Modules that a command line names, behind the flag or in an option that holds functions.

    Other options may hold names of files, and those come from others too.

    >>> sorted(named(["ppo", "--reward", "a.b:f", "c=compare:d:g@0.5", "--data", "e:f", "--allow-code=h"]))
    ['a.b', 'd', 'h']
    """
    flag, found = "", set()
    for word in argv:
        if word.startswith("--"):
            flag, equals, word = word.partition("=")
            flag = flag.replace("_", "-")
            if not equals:
                continue
        if flag == FLAG:
            found.add(word.partition(":")[0])
        elif flag in SPEAKING:
            found |= modules(re.split(r"[\s=,@\[\]]", word))
        flag = flag if flag in SEVERAL else ""
    return found


def modules(names: Iterable[str]) -> set[str]:
    """Of the functions among names of rewards."""
    return {found["module"] for name in names if (found := FUNCTION.fullmatch(name))}


def function(name: str, option: str = "reward") -> tuple[str, str]:
    """Module and function of a name.

    Raises:
        ValueError: It names no function, or one that may not be imported; says which flag would allow it.
    """
    name = MOVED.get(name, name)
    if (found := FUNCTION.fullmatch(name)) is None:
        raise none_such(name, option, "it is none of these")
    module = found["module"]
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{option}: got {name!r}, but {module} is Python's own, and holds no rewards and no judges")
    asked = name in OURS or _allowed is None or any(f"{module}.".startswith(f"{known}.") for known in _allowed)
    if not asked:
        raise ValueError(
            f"{option}: got {name!r}, which is Python code of a module that the command line does not name; "
            f"{FLAG} {module} lets it run"
        )
    return module, found["function"]


def none_such(name: str, option: str, why: object) -> ValueError:
    """The error about a function that is not there."""
    return ValueError(f"{option}: got {name!r}, want a reward model's folder or module:function, {OTHERS} ({why})")


def check_function(name: str, option: str = "reward") -> None:
    """Looks whether there is such a function, and whether it is allowed, and runs nothing.

    Raises:
        ValueError: There is none, or it is not allowed.
    """
    module, wanted = function(name, option)
    if (file := source_of(module)) is None:
        raise none_such(name, option, f"there is no module {module}")
    if not _defines(file, wanted):
        raise none_such(name, option, f"{file} defines no {wanted}")


def source_of(module: str) -> Path | None:
    """The file of a module; not even the packages around it are imported."""
    look_here()
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin is not None and Path(spec.origin).is_file() else None
    for folder in spec.submodule_search_locations or ():
        *above, last = rest
        place = Path(folder, *above)
        for file in (place / last / "__init__.py", *(place / (last + suffix) for suffix in all_suffixes())):
            if file.is_file():
                return file
    return None


def look_here() -> None:
    """Modules in the folder where the command was given count; they are looked for last, and only when asked for."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _defines(file: Path, name: str) -> bool:
    """Whether a module has a name, by its source; compiled ones and those with stars in their imports may."""
    if file.suffix != ".py":
        return True
    source = file.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = symtable.symtable(source, str(file), "exec")  # type: ignore[arg-type]  bytes, for their encoding
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as Python: {error}") from None
    names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return name in names or "__getattr__" in names or b"import *" in source
