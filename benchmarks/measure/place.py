"""Which device is measured, by its name, and where tensors for it are made."""

from __future__ import annotations

import torch

CHOICES = ("auto", "cuda", "cpu")


def chosen(wanted: str) -> str:
    """ "cuda" or "cpu"; auto is the GPU where there is one.

    Raises:
        ValueError: A GPU is wanted, and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ValueError("cuda: torch sees no GPU here; cpu measures the processor")
    return "cuda" if there and wanted != "cpu" else "cpu"


def place(device: str) -> str:
    """Where its tensors are made: there. A dry run replaces this, and makes them on the CPU."""
    return device


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
