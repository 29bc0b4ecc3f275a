"""The stages of a run one after another: each with its share of the time, none able to take the others with it."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.base import brief
from benchmarks.gpu import STAGES, fake
from benchmarks.gpu.context import Broken, Context, OutOfTime, Told
from benchmarks.gpu.record import LOG, NO_TIME, Record, is_cut
from benchmarks.gpu.resume import Refused, resume
from benchmarks.gpu.stages import extension
from benchmarks.report.kernel_hash import ROOT, hashes

GRACE = 4.0  # seconds past its deadline after which a stage is stopped
LEAST = 1.0  # seconds without which none is begun


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _entry(device: str) -> str:
    """Which entry of the table this chip gets, its own or another's."""
    from rlhf_kernels.backends.triton import table

    found, capability = table.entry(torch.device(device)), torch.cuda.get_device_capability()
    owner = next((key for key, value in table.BY_CAPABILITY.items() if value is found), None)
    if owner is None:
        return "the conservative one: no other is listed for this chip"
    return f"that of {owner[0]}.{owner[1]}" + ("" if owner == capability else ", borrowed: this chip is not listed")


def about(dry: bool) -> dict[str, Any]:
    """The machine and the versions."""
    properties = torch.cuda.get_device_properties(0)
    triton: Any = importlib.import_module("triton")
    environment: Any = importlib.import_module("benchmarks.report.environment")
    return {
        "device": torch.cuda.get_device_name(), "dry": dry,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()), "sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "commit": environment.commit(), "entry": _entry("cuda"),
    }  # fmt: skip


@contextlib.contextmanager
def counted_warnings(record: Record, stage: str) -> Iterator[None]:
    """No warning is shown or raised; how often each came is in the log at the end."""
    seen: Counter[str] = Counter()

    def count(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        seen[f"{category.__name__}: {' '.join(str(message).split())[:200]}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        try:
            yield
        finally:
            for text, times in seen.most_common(30):
                record.say(f"{stage}: warned {times} times, {text}")


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """``OutOfTime`` is raised in the block after so many seconds, and again should it go on regardless."""

    def bite(*_: Any) -> None:
        raise OutOfTime("stopped by the watchdog")

    before = signal.signal(signal.SIGALRM, bite)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_stage(name: str, record: Record, seconds: float, dry: bool) -> bool:
    """Run one stage, and note how it ended.

    Returns:
        Whether the device still answers.
    """
    record.begin(name, seconds)
    ctx = Context(name, record, time.monotonic() + seconds, dry=dry)
    status, why, answers = "done", None, True
    with counted_warnings(record, name):
        try:
            with watchdog(seconds + GRACE):
                importlib.import_module(f"benchmarks.gpu.stages.{name}").run(ctx)
                torch.cuda.synchronize()
            if any(map(is_cut, record.stages[name]["rows"])):
                status, why = "partly", "its time was over before its work"
        except OutOfTime as error:
            status, why = "stopped", str(error)
            record.say(traceback.format_exc())
        except Broken as error:
            status, why, answers = "failed", f"the device answers no more: {error}", False
        except (Exception, SystemExit) as error:
            status, why = "failed", brief(error)
            record.say(traceback.format_exc())
            with contextlib.suppress(Exception):
                traceback.clear_frames(error.__traceback__)
            try:
                ctx._still_there()
            except Broken:
                answers = False
    if answers:
        with contextlib.suppress(Exception):
            gc.collect()
            torch.cuda.empty_cache()  # other processes may want the memory
    record.end(name, status, why)
    return answers


def run(record: Record, names: Sequence[str], until: float, dry: bool) -> bool:
    """All named stages that have not begun yet; ``until`` is on the clock of ``time.time``.

    Returns:
        Whether the device still answers. If not, the stages after the one that broke it are left to another process.
    """
    to_do = [name for name in names if name not in record.stages]
    for i, name in enumerate(to_do):
        left = until - time.time()
        seconds = left * STAGES[name][dry] / sum(STAGES[other][dry] for other in to_do[i:])
        if seconds < LEAST:
            record.end(name, "skipped", NO_TIME)
        elif not run_stage(name, record, seconds, dry):
            return False
    return True


def work(
    folder: Path, names: Sequence[str], until: float, dry: bool, old: Path | None, carried: Path | None = None
) -> int:
    """What the process does that runs stages. Its exit status is read by ``supervise``, which may tell it to end."""
    record = Record(folder)

    def told(*_: Any) -> None:
        raise Told

    before = signal.signal(signal.SIGTERM, told)
    with contextlib.suppress(Told), contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        if dry:
            stack.enter_context(fake.faked())
        log = stack.enter_context(open(folder / LOG, "a"))
        # should the host hang where no signal reaches Python, the log says where
        faulthandler.dump_traceback_later(max(until - time.time(), 1) + 2 * GRACE, file=log)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        if not torch.cuda.is_available():
            print("there is no GPU here; --dry runs the same lines without one", file=sys.stderr)
            return 2
        # before anything compiles or a peer is imported, in each of the processes that a run may need
        used = importlib.import_module("benchmarks.gpu.ahead.carried").use(carried) if carried else None
        if "about" not in record.content:
            with counted_warnings(record, "about"):
                now, sources = about(dry) | {"carried": used}, hashes()
            if old is not None:
                try:
                    resume(record, old, names, now, sources)
                except Refused as error:
                    print(error, file=sys.stderr)
                    return 2
            record.content = {"about": now, "sources": sources, "stages": record.stages}
            record.write()
        if not dry:
            extension.start(folder)
        return 0 if run(record, names, until, dry) else 1
    return 128 + signal.SIGTERM
