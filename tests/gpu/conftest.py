"""Three kinds of proof for GPU kernels, each with a process of its own.

``interpret``: numbers, on a CPU, under TRITON_INTERPRET=1. ``compile``: code for real chips, on a CPU, without it: the
interpreter leaves ``triton.language`` patched, and nothing compiles after that. ``device``: both, on a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["compile/*", "device/*"] if INTERPRETED else ["interpret/*"]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["compile/*", "interpret/*", "device/*"]
elif not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob.append("device/*")


def pytest_report_header(config: pytest.Config) -> str:
    return f"GPU kernels: interpreted {INTERPRETED}, device {torch.cuda.is_available()}"
