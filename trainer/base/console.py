"""What a run shows: with rich on a terminal one moving bar per stage, otherwise plain lines that suit a log file.

Texts come from models, data files, servers and file names. Everything that is shown goes through ``visible``.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Protocol

from trainer.base.address import redacted

LINES_PER_STAGE = 5
SECONDS_BETWEEN_LINES = 20.0
SHOWN_METRICS = 4
# Controls but for tab and line feed, C1 among them; separators of lines and paragraphs; what turns the direction of a
# line around; tags, which nobody sees; and halves of surrogate pairs, which no stream can write.
UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\U000e0000-\\U000e007f\\ud800-\\udfff]"
)
HEADLINES = ("loss", "accuracy", "scores", "kl", "win_rate", "entropy", "length", "grad_norm")
# This metric is a sum over each reply; where another of its name is per token, as in every stage, that one is shown.
PER_REPLY = ("objective/entropy",)


def visible(text: str) -> str:
    r"""A text as a terminal may have it: what would steer the terminal, or hide from it, is written as an escape.

    >>> print(visible("a title: \x1b]0;mine\x07 and \u202egnp.exe"))
    a title: \x1b]0;mine\x07 and \u202egnp.exe
    """
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, *, error: bool = False) -> None:
    """Prints a text, to standard output or standard error; the only way to the screen beside the ``Console``."""
    stream = sys.stderr if error else sys.stdout
    print(_writable(visible(text), stream), file=stream, flush=error)


def unforeseen(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """``sys.excepthook`` of the program: a traceback quotes what went wrong, which may be a text of others."""
    say(redacted("".join(traceback.format_exception(kind, error, tb)).rstrip("\n")), error=True)


class Parser(argparse.ArgumentParser):
    """argparse, whose errors quote what was typed or pasted."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and exits."""
        super().error(visible(redacted(message)))


def quiet_escapes(logger: str) -> None:
    """Makes a library's messages, which quote files of others, as harmless as ours.

    Args:
        logger: Its top logger. Filters of a logger are passed by what its children say; those of its handlers are not.
    """

    def harmless(record: logging.LogRecord) -> bool:
        record.msg, record.args = visible(redacted(record.getMessage())), None
        return True

    for handler in logging.getLogger(logger).handlers:
        handler.addFilter(harmless)


def warned(message: Warning | str, kind: type[Warning], file: str, line: int, source: str | None = None) -> str:
    """``warnings.formatwarning`` of the program."""
    return visible(redacted(f"{file}:{line}: {kind.__name__}: {message}\n"))


def _writable(text: str, stream: Any) -> str:
    """What the stream's encoding does not know is escaped too: no run ends because of a letter."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class ProgressBar(Protocol):
    """One stage's bar."""

    def start(self) -> None: ...
    def step(self, done: int, metrics: Mapping[str, float]) -> None: ...
    def stop(self) -> None: ...


class Console:
    """Prints tables, samples and notes; hands out progress bars.

    Args:
        quiet: Print nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.rich = None if quiet else _rich_console()

    def progress(self, stage: str, total: int, done: int = 0) -> ProgressBar:
        """A bar of `total` steps, `done` of which lie behind."""
        if self.quiet:
            return SilentProgress()
        return RichProgress(self.rich, stage, total, done) if self.rich else PlainProgress(stage, total, done)

    def note(self, text: str) -> None:
        """Prints one line of text, as it is."""
        if self.rich:
            self.rich.print(_plain(text))
        elif not self.quiet:
            say(text)
            sys.stdout.flush()

    def table(self, title: str, rows: Sequence[tuple[str, ...]]) -> None:
        """Prints rows with aligned columns."""
        if self.rich:
            from rich.table import Table

            table = Table(title=_plain(title), title_justify="left", title_style="bold", show_header=False)
            for row in rows:
                table.add_row(*map(_plain, row))
            self.rich.print(table)
        else:
            self.note(plain_table(title, rows))

    def samples(self, title: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Prints each sample as `name: value` lines."""
        self.note(title)
        for sample in samples:
            width = max(map(len, sample), default=0)
            lines = [f"  {name:>{width}}  {' '.join(show(value).split())}" for name, value in sample.items()]
            self.note("\n".join([*lines, ""]))


class SilentProgress:
    """Shows nothing."""

    def start(self) -> None:
        """Nothing."""

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class PlainProgress:
    """About five lines per stage, more when it is slow: readable in a log file, quiet in a pipe."""

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self.stage, self.total, self.behind = stage, total, done

    def start(self) -> None:
        """Starts the clock."""
        self.began = self.printed_at = time.monotonic()
        self.printed = self.behind

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Prints when a fifth of the stage or twenty seconds have passed."""
        now = time.monotonic()
        due = (done * LINES_PER_STAGE) // self.total > (self.printed * LINES_PER_STAGE) // self.total
        if not due and done < self.total and now - self.printed_at < SECONDS_BETWEEN_LINES:
            return
        self.printed, self.printed_at = done, now
        spent = now - self.began
        left = f", {spent / (done - self.behind) * (self.total - done):.0f} s left" if done < self.total else ""
        count = f"{done:>{len(str(self.total))}}/{self.total}"
        say(f"{self.stage}  {count}  {headline(metrics)}  ({spent:.0f} s{left})")
        sys.stdout.flush()

    def stop(self) -> None:
        """Nothing to clean up."""


class RichProgress:
    """A moving bar with the latest metrics beside it."""

    def __init__(self, console: Any, stage: str, total: int, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name = TextColumn("{task.fields[stage]}", style="bold", markup=False)
        latest = TextColumn("{task.fields[latest]}", style="dim", markup=False)
        self.bar = Progress(
            name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True), latest,
            console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total, completed=done, stage=visible(stage), latest="")

    def start(self) -> None:
        """Shows the bar."""
        self.bar.start()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar."""
        self.bar.update(self.task, completed=done, latest=visible(headline(metrics)))

    def stop(self) -> None:
        """Leaves the bar on the screen and gives the terminal back, after an error too."""
        self.bar.stop()


def plain_name(metric: str) -> str:
    """A metric's name without its group and without the word for its average.

    >>> plain_name("policy/entropy_avg"), plain_name("objective/kl")
    ('entropy', 'kl')
    """
    return metric.split("/")[-1].removesuffix("_avg").removesuffix("_mean").removeprefix("mean_")


def headline(metrics: Mapping[str, float]) -> str:
    """The few metrics that tell how it goes, in short.

    >>> headline({"lr": 0.1, "policy/entropy_avg": 0.5, "loss": 1.23456})
    'loss 1.235  entropy 0.5  lr 0.1'
    """
    named: dict[str, float] = {}
    for name, value in sorted(metrics.items(), key=lambda item: item[0] in PER_REPLY):
        named.setdefault(plain_name(name), value)
    ordered = sorted(named, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))
    return "  ".join(f"{name} {named[name]:.4g}" for name in ordered[:SHOWN_METRICS])


def show(value: Any) -> str:
    """A value as people read it: floats in four digits, text as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain_table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns without any line drawing; a cell is one line, whatever it holds.

    >>> print(plain_table("sft", [("loss", "1.2"), ("exact match", "0.5 ± 0.1")]))
    sft
      loss         1.2
      exact match  0.5 ± 0.1
    """
    rows = [tuple(visible(" ".join(cell.split("\n"))) for cell in row) for row in rows]
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _plain(text: str) -> Any:
    """For rich: neither markup, nor emoji, nor colours of numbers."""
    from rich.text import Text

    return Text(_writable(visible(text), sys.stdout))


def _rich_console() -> Any:
    """rich's console where there is a terminal to draw on and rich to draw with."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    return RichConsole()
