"""Options of a new configuration: each becomes what its type says, or is refused.

A path may be a text and a name of a model a path, and ``~`` is a home. The command line has tyro for the rest; this is
for configurations that are made in Python.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

KINDS: dict[type, tuple[type, ...]] = {
    bool: (bool,), int: (numbers.Integral,), float: (numbers.Real,), str: (str, os.PathLike), Path: (str, os.PathLike),
    type(None): (type(None),),
}  # fmt: skip
WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "None",
}
HOME = re.compile(r"(?:^|(?<=[=,]))~\w*(?=/|$)")


def home(text: str) -> str:
    """A word of a command line, or an option that may hold names of files, with ``~`` as a shell would write it.

    Shells leave it as it is in quotes and behind ``--out=``, and YAML knows nothing of it. A folder with this name
    would be a trap: whoever removes it as ``~`` loses his home. Addresses stay as they are.

    >>> home("--out=~/run") == "--out=" + os.path.expanduser("~/run"), home("https://h/x?in=~/y"), home("a~b")
    (True, 'https://h/x?in=~/y', 'a~b')
    """
    names, scheme, address = text.partition("://")
    return HOME.sub(lambda found: os.path.expanduser(found[0]), names) + scheme + address


def settle(config: Any) -> None:
    """Makes the options of a new configuration what their types say: paths of texts, names of models of paths.

    Raises:
        ValueError: A path is neither a text nor a path; names the option.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if kind.startswith("Path"):
            value = None if value is None and "None" in kind else _path(field.name, value)
        elif kind == "tuple[Path, ...]":
            several = (value,) if isinstance(value, str | os.PathLike) else value
            value = tuple(_path(field.name, item) for item in several)
        elif kind.startswith("str"):
            value = tuple(map(_text, value)) if isinstance(value, tuple | list) else _text(value)
        object.__setattr__(config, field.name, value)  # The class is frozen, and this one still in the making.


def _path(option: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{option}: got {value!r:.60}, want the name of a file or folder")
    path = Path(os.path.expanduser(value))
    # "./~" is a folder here, and as a Path it would be "~", which is expanded where a config is made of this one.
    return path.absolute() if path.parts[:1] and path.parts[0].startswith("~") else path


def _text(value: Any) -> Any:
    return home(str(value)) if isinstance(value, str | os.PathLike) else value


def check_types(config: Any) -> None:
    """Refuses options that are not what their types say.

    Args:
        config: A dataclass whose types are plain ones, ``Literal``, unions and tuples of these.

    Raises:
        ValueError: Names the option, what it got and what it wants.

    Example:
        >>> from typing import Literal
        >>> @dataclasses.dataclass
        ... class Config:
        ...     schedule: Literal["constant", "cosine"] | None = None
        >>> check_types(Config("cos"))
        Traceback (most recent call last):
        ValueError: schedule: got 'cos', want constant, cosine or None
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            *several, last = _told(hint)
            wanted = f"{', '.join(several)} or {last}" if several else last
            if callable(value):
                wanted = "the name of a function as text, module:function"
            raise ValueError(f"{field.name}: got {value!r:.60}, want {wanted}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inside)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        every = [inside[0]] * len(value) if inside[-1] is Ellipsis else list(inside)
        return len(value) == len(every) and all(map(_fits, value, every))
    if hint in KINDS:
        return isinstance(value, KINDS[hint]) and (hint is bool or not isinstance(value, bool))
    return True


def _told(hint: Any) -> list[str]:
    """What a type admits, in words."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(word for one in inside for word in _told(one)))
    if origin is Literal:
        return [str(one) for one in inside]
    if origin is tuple:
        each = _told(inside[0])
        count = "several of" if inside[-1] is Ellipsis else f"{len(inside)} of"
        return [f"{count} {' or '.join(each)}"]
    return [WORDS.get(hint, str(hint))]
