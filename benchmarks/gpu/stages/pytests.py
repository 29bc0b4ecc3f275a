"""The project's own tests, those that only a GPU can run and those that the CPU's backends pass too."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.stages.commands import command

DEVICE = ["tests/gpu/device"]
JUDGED = [
    *(f"tests/kernels/engine/test_{name}.py" for name in ("token_stats", "numerics", "fused", "tolerance")),
    "tests/contracts/test_every_loss.py",
]
MOST = 40  # failures that are named


def summary(file: Path) -> dict[str, Any]:
    """What pytest has left in its XML, if it came to that."""
    if not file.exists():
        return {"complete": False}
    cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = [f"{c.get('classname')}::{c.get('name')}" for c in failed]
    first = [
        (found.get("message") or "").splitlines()[:1]
        for c in failed
        for found in (c.find("failure"), c.find("error"))
        if found is not None
    ]
    return {
        "passed": len(cases) - len(failed) - skipped, "tests_skipped": skipped, "failures": len(failed),
        "names": names[:MOST], "messages": [line[0][:160] for line in first if line][:MOST],
    }  # fmt: skip


def tests(ctx: Context, what: str, paths: list[str], seconds: float, **environment: str) -> None:
    """A row for one call of pytest."""
    xml = ctx.out / f"pytests-{what}.xml"
    many = ["-n", "8"] if importlib.util.find_spec("xdist") and not ctx.dry else []
    only = ["--collect-only"] if ctx.dry else ["--junitxml", str(xml), f"--maxfail={MOST}"]
    words = [sys.executable, "-m", "pytest", "-q", *many, *only, "-W", "default", "-p", "no:cacheprovider", *paths]
    # torch's deterministic mode, which the tests turn on, wants the variable
    done = command(words, ctx.out / f"pytests-{what}.log", seconds, CUBLAS_WORKSPACE_CONFIG=":4096:8", **environment)
    found = {} if ctx.dry else summary(xml)  # which only collects
    nothing_here = ctx.dry and done.status == 5  # without a GPU none of them is collected
    ctx.row(
        what=what,
        ok=done.status == 0 or nothing_here,
        status=done.status,
        seconds=done.seconds,
        last=done.last(2),
        **found,
    )


def run(ctx: Context) -> None:
    with ctx.attempt("device"):
        tests(ctx, "device", DEVICE, 0.6 * ctx.left())
    with ctx.attempt("judged"):
        tests(ctx, "judged", JUDGED[:1] if ctx.dry else JUDGED, ctx.left(), RLHF_KERNELS_TEST_GPU="1")
