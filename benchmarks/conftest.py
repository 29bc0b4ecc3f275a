"""`pytest benchmarks/ --benchmark-only`: collects bench_*.py, which a plain `pytest` does not; ends with one table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

collect_ignore = ["gpu_probe.py", "gpu_probe_kernels.py"]
MEASURED = pytest.StashKey[dict[tuple[Any, ...], tuple[list[Any], dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", choices=("small", "full"), default="small", help="of shapes, entropies and contenders")
    parser.addoption("--table-out", type=Path, help="where to leave the rows of the table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")  # peers warn as they like
    config.stash[MEASURED] = {}


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    given = parent.session.isinitpath(file_path)  # pytest collects what it is told by name
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not given:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def entered(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Any]:
    """(contender, batch, judge, what the table is of, row of further numbers) -> measured and remembered.

    A contender that is not there is skipped by name; whoever is wrong is in the table, marked.
    """
    from benchmarks.measure import enter, forward_seconds

    found: list[tuple[Any, ...]] = []

    def measure(contender: Any, batch: Any, judge: Any, about: dict[str, Any], rounds: int = 5) -> dict[str, Any]:
        row, step = enter(contender, batch, judge)
        row |= about
        forward: list[float | None] = []
        found.append((tuple(sorted(about.items())), row, forward))
        if step is None:
            pytest.skip(row["verdict"])
        benchmark.extra_info |= {"verdict": row["verdict"], **row["errors"]}
        benchmark.pedantic(lambda: forward.append(forward_seconds(step())), rounds=rounds)
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
    if not any(times for _, times in tables.values()):
        return
    from benchmarks import report
    from benchmarks.measure import ranked

    rows = [row for found, times in tables.values() for row in ranked(found, times)]
    environment = report.environment(torch.get_num_threads(), None)
    terminalreporter.section("side by side")
    terminalreporter.write_line(report.heading(environment))
    terminalreporter.write_line("One contender after the other: benchmarks.side_by_side takes turns, and is steadier.")
    terminalreporter.write_line("")
    terminalreporter.write_line(report.markdown(rows))
    out = config.getoption("table_out")
    if out:
        out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
