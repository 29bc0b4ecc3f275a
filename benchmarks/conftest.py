"""`pytest benchmarks/ --benchmark-only`: collects bench_*.py, which a plain `pytest` does not."""

from __future__ import annotations

from pathlib import Path

import pytest

collect_ignore = ["gpu_probe.py", "gpu_probe_kernels.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")  # peers warn as they like


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None
