"""What a stage is given: where tensors are made, how much time is left, and where results go."""

from __future__ import annotations

import contextlib
import gc
import math
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.base import Skipped, brief
from benchmarks.gpu.record import NO_TIME, Record


class OutOfTime(BaseException):
    """The watchdog's: no ``except Exception`` of a stage may swallow it."""


class Told(BaseException):
    """Somebody has told this process to end: everything on the way out is tidied up, other programs included."""


class Broken(BaseException):
    """The device answers no more: only another process can go on."""


def plain(x: Any) -> Any:
    """What JSON can hold, with five digits of each number."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else str(x)
    return x if x is None or isinstance(x, bool | int | str) else str(x)


class Context:
    """One stage's view of the world."""

    def __init__(self, name: str, record: Record, until: float, *, dry: bool) -> None:
        self.name, self.record, self.until, self.dry = name, record, until, dry
        self.device = "cuda"  # the name, also where a dry run makes its tensors elsewhere
        self.place = "cpu" if dry else "cuda"
        self.backend = "triton"

    @property
    def out(self) -> Path:
        """The folder for further files."""
        return self.record.folder

    def left(self) -> float:
        """Seconds until the deadline of this stage."""
        return self.until - time.monotonic()

    def row(self, **cells: Any) -> None:
        """One result, on the disk at once."""
        cells = plain(cells)
        self.record.add(self.name, cells)
        self.say(" ".join(f"{key}={value}" for key, value in cells.items()))

    def cut(self, what: str, **cells: Any) -> None:
        """A row for work that the time did not suffice for; another run may go on from there."""
        self.row(what=what, **cells, skipped=NO_TIME)

    def say(self, text: str) -> None:
        """One line of the log."""
        self.record.say(f"{self.name}: {text}")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside becomes a row, and the next goes on."""
        try:
            yield
        except ImportError as error:
            self.row(what=what, skipped=brief(error))
        except Skipped as error:
            self.row(what=what, skipped=str(error))
        except Exception as error:
            self.row(what=what, failed=brief(error))
            self.record.say(traceback.format_exc())
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            del error
            self._still_there()

    def _still_there(self) -> None:
        """After an illegal access every later call of the process fails; after lack of memory none does.

        Raises:
            Broken: The device does not answer.
        """
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise Broken(brief(error)) from error
