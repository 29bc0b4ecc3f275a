"""The folder of a model: read without running anything that lies in it, believed only when it is whole, and replaced
without losing what others put there.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from trainer.base.console import quiet_escapes
from trainer.models.attention import NAME

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
GENERATION = "generation_config.json"  # It says how the model would like to be sampled.
SHOWN = 3  # A message shows so many names.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
WRITTEN = frozenset({
    "config.json", GENERATION, INDEX, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
})  # fmt: skip
"""What transformers writes beside the weights: the model that is replaced, and nobody's notes about it."""


for library in ("transformers", "huggingface_hub"):
    quiet_escapes(library)


def config_of(path: str) -> Any:
    """The configuration of a model, without what would make transformers fetch code or patch its own.

    Args:
        path: A local directory or hub id.

    Raises:
        ValueError: It cannot be read, or asks for what we do not load: code of its own, an adapter, quantised weights,
            weights that are not safetensors.
        OSError: It is not there, or there is no reading it.
    """
    with _explained(path):
        adapted = _file(path, ADAPTER)
        config = None if adapted else AutoConfig.from_pretrained(path, trust_remote_code=False)
        others = [] if config is None else _not_safetensors(path, config)
    if adapted:
        raise ValueError(f"model: {path} is an adapter ({ADAPTER}), want a whole model: merge it into its base first")
    if (how := getattr(config, "quantization_config", None)) is not None:
        method = how.get("quant_method") if isinstance(how, dict) else type(how).__name__
        raise ValueError(f"model: {path} is quantised ({method}), want plain weights, which training can change")
    if others:
        raise ValueError(f"model: {path} keeps weights in {others[0]}, and nothing but safetensors is read")
    assert config is not None
    # Names of kernels on the hub lie here; the setters reach every configuration inside of this one.
    config._attn_implementation = config._experts_implementation = None
    if getattr(config, "fusion_config", None) is not None:  # It would patch classes of transformers.
        config.fusion_config = None
    return config


def tokenizer_of(path: str) -> Any:
    """The tokenizer in a model's folder, or of a hub id.

    Raises:
        ValueError: It cannot be read, or wants to run code of its own.
        OSError: It is not there.
    """
    with _explained(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load(kind: Any, path: str) -> Any:
    """A whole model in float32, with the attention that keeps packed sequences apart.

    Args:
        kind: An auto class of transformers.
        path: A local directory or hub id.

    Raises:
        ValueError: What ``config_of`` raises; or weights are missing, are not the model's, have another shape, or are
            not finite. A tied head is not missing.
        OSError: There are no weights in safetensors.
    """
    config = config_of(path)
    with _explained(path), _unreported():
        model, found = kind.from_pretrained(
            path, config=config, trust_remote_code=False, attn_implementation=NAME, dtype=torch.float32,
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    shapes = [f"{key} {list(is_)} for {list(wanted)}" for key, is_, wanted in found["mismatched_keys"]]
    problems = [
        _count(found["missing_keys"], "missing"), _count(found["unexpected_keys"], "unknown"),
        _count(shapes, "of another shape"),
    ]  # fmt: skip
    if any(problems):
        told = "; ".join(filter(None, problems))
        raise ValueError(f"model: {path} does not hold the weights of {type(model).__name__}: {told}")
    if odd := [key for key, x in model.state_dict().items() if not _finite(x)]:
        raise ValueError(f"model: {path} holds weights of NaN or infinity: {_count(odd, 'not finite')}")
    return model


def save(path: Path, model: Any, tokenizer: Any) -> None:
    """Writes safetensors, config.json and the tokenizer, or nothing at all.

    It writes beside ``path`` and renames, so that a reader finds the old model or the new one and never a half. Files
    of others in the old folder move on into the new one, and a link stays a link.
    """
    path = Path(os.path.realpath(path))
    aside, old = path.with_name(f".{path.name}.saving"), path.with_name(f".{path.name}.replaced")
    if old.exists() and not path.exists():  # Somebody was killed between the two renames.
        old.rename(path)
    for leftover in (aside, old):
        if leftover.is_symlink():  # In a folder that came from others it may lead elsewhere.
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
    _write(aside, model)
    tokenizer.save_pretrained(aside)
    for file in aside.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        _keep_theirs(path, aside)
        path.rename(old)
    aside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, model: Any) -> None:
    """The model with its suggestions for sampling as they came.

    Many public models suggest a temperature and leave out ``do_sample``. Transformers loads that, and refuses to save
    it; but what a model suggests is nothing that training changes.
    """
    if not model.can_generate():
        model.save_pretrained(folder)
        return
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = theirs
    theirs.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])


def _keep_theirs(old: Path, new: Path) -> None:
    """Puts what is not of the model into the new folder as well: a card, notes, the same in other formats."""
    for file in old.iterdir():
        if file.name in WRITTEN or WEIGHTS.fullmatch(file.name) or (new / file.name).exists():
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.copytree(file, new / file.name, symlinks=True, copy_function=_same)
        else:
            _same(file, new / file.name)


def _same(file: Any, place: Any) -> Any:
    """Another name for a file, or a copy where the system has no second names."""
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, place, follow_symlinks=False)
    return place


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Whatever goes wrong while others read a model's folder becomes one line about it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (NAME,):
            raise ValueError(f"model: {path} has an attention that cannot be told to keep sequences apart") from None
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            raise ValueError(
                f"model: {path} asks to run code of its own (trust_remote_code), and the code of a model is never run"
            ) from None
        what = _absent(path) if isinstance(error, OSError) and not Path(path).exists() else f"{path} cannot be loaded"
        what = f"model: {what}: {type(error).__name__}: {said}"
        raise (OSError(what) if isinstance(error, OSError) else ValueError(what)) from error


def _absent(path: str) -> str:
    """What a name stands for that is no folder: one that was meant, a model that was fetched before, or nothing."""
    folder, siblings = Path(path), []
    with contextlib.suppress(OSError):
        siblings = [sibling.name for sibling in folder.parent.iterdir() if sibling.is_dir()]
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f" (did you mean {folder.parent / near[0]}?)" if near else ""
    try:
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return f"{path} cannot be loaded"
    except HFValidationError:
        return f"there is no folder {path}{hint}, and no model on the Hugging Face hub has such a name"
    return f"there is no folder {path}{hint}, no such model in the Hugging Face cache, and none came from the hub"


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Without the table of keys that transformers would print: we say it in one line, and refuse."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _not_safetensors(path: str, config: Any) -> list[str]:
    """Files of weights that a configuration or an index names and that might be pickles."""
    named = getattr(config, "transformers_weights", None) or INDEX
    if not str(named).endswith(".json"):
        return [] if str(named).endswith(".safetensors") else [str(named)]
    index = _file(path, str(named))
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values() if index else []
    return sorted(file for file in set(map(str, files)) if not file.endswith(".safetensors"))


def _file(path: str, name: str) -> str | None:
    """A file of a model's folder, here or on the hub, if there is one."""
    return cached_file(
        path, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip


def _count(names: Collection[str], what: str) -> str:
    """``3 missing (a, b, c)``, or nothing."""
    shown = sorted(names)[:SHOWN]
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(shown)}{more})" if names else ""


def _finite(x: Tensor) -> bool:
    """Reads it once, without a copy."""
    if not x.is_floating_point() or x.numel() == 0:
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(x.detach()))
