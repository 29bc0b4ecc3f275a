"""What a run depends on, and how two runs differ: options, data files, models to start from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.base.config import plain
from trainer.base.paths import model_folder
from trainer.base.permission import FUNCTION, source_of
from trainer.data.hashing import sha256

FREE = frozenset({"out", "quiet", "save_every", "keep_last", "template_date", "log_to"})
"""Options that a resumed run may change."""


def inputs(config: Any) -> dict[str, str]:
    """A sha256 for every option that names a data file, the folder of a model, or a Python function's file.

    Args:
        config: A flat dataclass.

    Returns:
        Option to digest; where a value names several models, each has its own. Names of models that are not
        folders here (``tiny``, a hub id) are left out.

    Raises:
        FileNotFoundError: A data file does not exist.
    """
    found: dict[str, str] = {}
    if (date := getattr(config, "template_date", None)) and (folder := model_folder(config.model)) and _dated(folder):
        found["template_date"] = date
    for name, value in plain(config).items():
        if name == "out" or value is None:
            continue
        if name in ("data", "probes") or name.endswith("_data"):
            found[name] = sha256(value)
        elif isinstance(value, str) and (folder := model_folder(value)) is not None:
            found[name] = _folder_sha256(folder)
        else:  # perhaps models among other words, as in helpful=runs/a,runs/b@0.5
            texts = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
            for part in {p for text in texts for p in re.split("[=,@]", text)} - {""}:
                if (folder := model_folder(part)) is not None:
                    found[f"{name} ({part})"] = _folder_sha256(folder)
                elif (file := _source(part)) is not None:
                    found[f"{name} ({part})"] = sha256(file)
    return found


def _source(text: str) -> Path | None:
    """The file of a function that is given as ``module:function``; nothing is imported."""
    found = FUNCTION.fullmatch(text)
    return source_of(found["module"]) if found else None


def _dated(folder: Path) -> bool:
    """Whether the chat template in a folder asks for the day."""
    files = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    return any(file.is_file() and "strftime_now" in file.read_text("utf-8", "replace") for file in files)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], hashed: Mapping[str, Any]) -> list[str]:
    """One line per option that is not as it was.

    Args:
        then: Options of the earlier run.
        now: Options of this one.
        hashed: Names of options whose files are compared instead; their paths may change.

    Example:
        >>> differences({"lr": 0.1, "data": "a"}, {"lr": 0.2, "data": "b"}, {"data": "c0ffee"})
        ['lr: 0.1 at the checkpoint, 0.2 now']
    """
    nothing = "nothing"
    names = [n for n in dict.fromkeys([*then, *now]) if n not in FREE and n not in hashed]
    pairs = [(n, then.get(n, nothing), now.get(n, nothing)) for n in names]
    return [f"{n}: {a} at the checkpoint, {b} now" for n, a, b in pairs if a != b]


def _folder_sha256(folder: Path) -> str:
    """Of the weights, the configuration and the tokenizer in it."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"}:
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()
