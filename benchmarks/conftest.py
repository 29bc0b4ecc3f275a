"""`pytest benchmarks/ --benchmark-only`: collects suite/, which a plain `pytest` does not; ends with one table.

It measures a GPU where there is one, in three minutes, and a CPU in five: who would come later is left out by name.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure.place import CHOICES, chosen, wait

SUITE = Path(__file__).parent / "suite"
MEASURED = pytest.StashKey[dict[tuple[Any, ...], tuple[list[Any], dict[str, Any]]]]()
DEVICE, MOST, UNTIL = pytest.StashKey[str](), pytest.StashKey[float](), pytest.StashKey[float]()
OVER = "skipped: time is over"
MINUTES = {"cuda": 3.0, "cpu": 5.0}  # The small grid may take so many.
IN_TIME = 0.9  # Nothing begins after this share of them.
ROUND_SECONDS = 2.0  # The rounds of a contender may take so many, and are two at least.


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a number of minutes above zero")
    return number


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", choices=("small", "full"), default="small", help="of shapes, entropies and contenders")
    parser.addoption("--device", choices=CHOICES, default="auto", help="what is measured; auto: a GPU if there is one")
    parser.addoption(
        "--minutes", type=_minutes, help="for everything; 3 on a GPU, 5 on a CPU, no limit for the full grid"
    )
    parser.addoption("--table-out", type=Path, help="where to leave the rows of the table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")  # peers warn as they like
    config.stash[MEASURED] = {}
    try:
        config.stash[DEVICE] = device = chosen(str(config.getoption("device")))
    except ValueError as error:
        raise pytest.UsageError(f"--device {error}") from error
    minutes = config.getoption("minutes")
    if minutes is None:
        minutes = MINUTES[device] if config.getoption("grid") == "small" else float("inf")
    config.stash[MOST] = 60 * minutes * IN_TIME


def pytest_collection_finish(session: pytest.Session) -> None:
    """The clock starts when everything is imported."""
    session.config.stash[UNTIL] = time.monotonic() + session.config.stash[MOST]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    given = parent.session.isinitpath(file_path)  # pytest collects what it is told by name
    if file_path.parent == SUITE and file_path.suffix == ".py" and file_path.stem != "__init__" and not given:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The name of what is measured, "cuda" or "cpu"."""
    return request.config.stash[DEVICE]


@pytest.fixture
def in_time(request: pytest.FixtureRequest) -> Any:
    """Tells whether another measurement may begin."""
    return lambda: time.monotonic() < request.config.stash[UNTIL]


@pytest.fixture
def timed(benchmark: Any, device: str) -> Any:
    """(step, rounds, what to do with each result) -> times of the step, until the device has done it."""

    def measure(step: Any, rounds: int, then: Any = lambda _: None, warmup_rounds: int = 0) -> None:
        def done() -> None:
            result = step()
            wait(device)
            then(result)

        setup = {"setup": lambda: wait(device)}
        benchmark.pedantic(done, rounds=rounds, warmup_rounds=warmup_rounds, **setup)

    return measure


@pytest.fixture
def entered(request: pytest.FixtureRequest, benchmark: Any, timed: Any, in_time: Any, device: str) -> Iterator[Any]:
    """(contender, batch, judge, what the table is of, row of further numbers) -> measured and remembered.

    A contender that is not there is skipped by name; whoever is wrong is in the table, marked.
    """
    from benchmarks.measure import memory
    from benchmarks.measure.turns import enter, forward_seconds

    found: list[tuple[Any, ...]] = []

    def measure(contender: Any, batch: Any, judge: Any, about: dict[str, Any], rounds: int = 5) -> dict[str, Any]:
        row: dict[str, Any] = {"contender": contender.name, "side": contender.side, "verdict": OVER}
        step = None
        if in_time():
            row, step = enter(contender, batch, judge, profiled=False)
        row |= about
        forward: list[float | None] = []
        found.append((tuple(sorted(about.items())), row, forward))
        if step is None:
            pytest.skip(row["verdict"])
        benchmark.extra_info |= {"verdict": row["verdict"], **row["errors"]}
        if device == "cuda":
            row["extra_bytes"] = memory.extra(step, cuda=True)
        if not contender.compiles:
            rounds = max(2, min(rounds, int(ROUND_SECONDS / row["first_call_s"])))
        timed(step, rounds, lambda result: forward.append(forward_seconds(result)))
        return row

    yield measure
    for key, row, forward in found:
        rows, times = request.config.stash[MEASURED].setdefault(key, ([], {}))
        rows.append(row)
        stats = benchmark.stats
        if stats is not None and stats.stats.data:
            times[row["contender"]] = list(zip(stats.stats.data, forward[-len(stats.stats.data) :], strict=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tables = config.stash[MEASURED]
    late = sum(row["verdict"] == OVER for found, _ in tables.values() for row in found)
    if late:
        terminalreporter.write_line(f"Time was over for {late} of the contenders; --minutes gives more.")
    if not any(times for _, times in tables.values()):
        return
    from benchmarks.measure.turns import ranked
    from benchmarks.report import tables as report
    from benchmarks.report.environment import environment, write

    rows = [row for found, times in tables.values() for row in ranked(found, times)]
    here = environment(torch.get_num_threads(), device=config.stash[DEVICE])
    terminalreporter.section("side by side")
    terminalreporter.write_line(report.heading(here))
    terminalreporter.write_line("One after the other: python -m benchmarks compare takes turns, and is steadier.")
    terminalreporter.write_line("")
    terminalreporter.write_line(report.markdown(rows))
    write(config.getoption("table_out"), {"environment": here, "rows": rows})
