"""Files and folders as people name them: ``~`` is their home, and from Python a name may be a text or a ``Path``."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

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
