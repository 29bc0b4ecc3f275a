"""Every kernel once under compute-sanitizer: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import re
import shutil
import sys

from benchmarks.contenders.base import Skipped
from benchmarks.gpu.context import Context
from benchmarks.gpu.stages.commands import command

SMALL = [sys.executable, "-m", "benchmarks.gpu.stages.small"]
FOUND = 9  # the status by which the tool says that it has found something


def kernels(ctx: Context) -> None:
    """Without the tool, which makes compiling slow; in a dry run there is only this."""
    words, environment = ([*SMALL, "--few"], {"TRITON_INTERPRET": "1"}) if ctx.dry else (SMALL, {})
    done = command(words, ctx.out / "sanitize-nothing.log", ctx.left(), **environment)
    ctx.row(what="without the tool", ok=done.status == 0, status=done.status, seconds=done.seconds, last=done.last())


def sanitized(ctx: Context, tool: str, seconds: float) -> None:
    """Memory comes straight from the driver: torch's pools would hide an overrun."""
    program = shutil.which("compute-sanitizer", path="/usr/local/cuda/bin") or shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    words = [program, "--tool", tool, "--error-exitcode", str(FOUND), *SMALL]
    done = command(words, ctx.out / f"sanitize-{tool}.log", seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", done.text)
    cells = {"summary": summary, "complete": "every kernel ran" in done.text, "seconds": done.seconds}
    ctx.row(
        what=tool, ok=None if done.status is None else done.status == 0, status=done.status, last=done.last(), **cells
    )


def run(ctx: Context) -> None:
    with ctx.attempt("without the tool"):
        kernels(ctx)
    for tool, share in (("memcheck", 0.6), ("racecheck", 1.0)):
        with ctx.attempt(tool):
            sanitized(ctx, tool, share * ctx.left())
