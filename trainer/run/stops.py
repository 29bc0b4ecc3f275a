"""SIGTERM and Ctrl-C: stop as soon as nothing is lost by it.

A run is at any time either *interruptible* (generating, scoring, evaluating, taking gradients: nothing that a
checkpoint holds has changed since the last one could have been taken) or in a short step that must be finished. The
first signal ends the former at once and the latter when it is done. The second ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, at a moment from which the run can go on later."""


class Terminated(SystemExit):
    """SIGTERM, likewise; uncaught, it ends the process with status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


STOPS = {signal.SIGTERM: Terminated, signal.SIGINT: Interrupted}


class StopSignals:
    """What the handlers know. There is one per process, ``stop_signals``, because that is how signals are."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.escaped: BaseException | None = None  # the last exception that left an interruptible part
        self._open = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signals meanwhile. Outside the main thread, and within itself, it changes nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = self.escaped = None
        heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # nohup and the like
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises at once. Nothing that a checkpoint holds may change inside."""
        if self._open:
            yield
            return
        try:
            self._open = True
            self.check()
            yield
        except BaseException as error:
            self.escaped = error
            raise
        finally:
            self._open = False

    def check(self) -> None:
        """Raises if a signal has come in.

        Raises:
            Interrupted: After Ctrl-C.
            Terminated: After SIGTERM.
        """
        if self._before and self.received is not None:
            raise STOPS[self.received]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        os.write(2, f"\n{self.received.name}: stopping; once more to stop without saving\n".encode())
        if self._open:
            self.check()


stop_signals = StopSignals()
