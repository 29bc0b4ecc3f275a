"""What has to be settled before torch is imported: threads."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

MODEL, TINY = "model", "tiny"  # the option that names the model, and its default; more threads than one slow it down


def model_of(flags: list[str], recipe: Mapping[str, Any]) -> str:
    """The model as far as it can be known before torch, and with it the stage's config, is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{MODEL}", default=recipe.get(MODEL, TINY))
    try:
        return parser.parse_known_args(flags)[0].model
    except argparse.ArgumentError:
        return TINY


def set_threads(wanted: int | None, default: int | None) -> None:
    """Threads and spinning of OpenMP, which reads the environment once, when torch is imported.

    libgomp's threads spin while they wait; beside a busy neighbour that turns microseconds into milliseconds, so the
    spin is cut short whatever the number of threads.

    Args:
        wanted: From the command line or the recipe; wins over OMP_NUM_THREADS.
        default: Where neither says anything; None leaves the choice to torch.

    Raises:
        ValueError: `wanted` is not a positive integer.
    """
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise ValueError(f"threads: got {wanted!r}, want a positive integer")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if wanted is not None:
        os.environ["OMP_NUM_THREADS"] = str(wanted)
    elif default is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(default))
    # A caller that imported torch before us (a notebook, a test) has its OpenMP already; only the number can change.
    if "torch" in sys.modules and wanted is not None:
        sys.modules["torch"].set_num_threads(wanted)


def used_threads() -> int | None:
    """How many torch uses now; None if it was not imported."""
    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None


def one_bar_only() -> None:
    """Switches off transformers' bars for loading and saving, which would drown ours; downloads keep theirs."""
    if "transformers" in sys.modules:
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        importlib.import_module("huggingface_hub.utils").enable_progress_bars()
