"""Other programs, with what they say in files and an end to their time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.report.kernel_hash import ROOT

PATIENCE = 8.0  # seconds for a program that was told to end, before it and its children are killed


class Ended(NamedTuple):
    status: int | None  # None: it was stopped, its time being over
    seconds: float
    text: str

    def last(self, lines: int = 5) -> str:
        return " | ".join([line for line in self.text.splitlines() if line.strip()][-lines:])


def command(words: list[str], log: Path, seconds: float, **environment: str) -> Ended:
    """Run it in the checkout. It is interrupted in time to say what it knows, and then killed."""
    path = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    import_path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": import_path, **environment}
    began, status = time.monotonic(), None
    with open(log, "wb") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(seconds - PATIENCE, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whoever it has left behind
            process.wait()
    return Ended(status, round(time.monotonic() - began, 1), log.read_text(errors="replace"))
