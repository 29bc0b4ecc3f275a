"""What all tests share: backends, dtypes, and memory that is poisoned before use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import rlhf_kernels as rk

if TYPE_CHECKING:
    from tests.support.runs import Stopper

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # GPU kernels on the CPU, by Triton's interpreter
FERRIED = os.environ.get("RLHF_KERNELS_TEST_GPU") == "1"  # GPU kernels on a GPU, under the tests of the CPU
BACKENDS = ("triton, strips", "triton, fused") if INTERPRETED or FERRIED else ("eager", "native")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:rlhf_kernels runs on the backend 'eager'")  # no compiler, no _C
    if INTERPRETED:
        from tests.gpu.interpret import shim

        shim.install()
        config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The other two runs are for what a GPU kernel computes: tests of backends, in the precisions that it has."""
    if not (INTERPRETED or FERRIED):
        return

    def of_a_kernel(item: pytest.Item) -> bool:
        own = "gpu" in item.path.parts
        doubles = any(word in item.nodeid for word in ("float64", "gradcheck", "double"))
        return own or ("backend" in getattr(item, "fixturenames", ()) and not doubles)

    chosen = [item for item in items if of_a_kernel(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_terminal_summary(terminalreporter) -> None:
    """What a test wants seen in the log of a run that passes."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.write_line(f"\n{text}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend of the CPU; native is skipped only where the extension was not built. Or both ways of triton's."""
    name, _, way = request.param.partition(", ")
    reason = rk.backends()[name]
    if reason != "ok":
        assert name == "native", f"{name} must run everywhere: {reason}"
        pytest.importorskip("rlhf_kernels._C", reason=reason)
        pytest.fail(f"the extension is there, and yet: {reason}")
    if way:
        from tests.gpu import ways

        ways.choose(way, monkeypatch, ferried=FERRIED)
    return name


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` hands out NaN, so whoever reads what was never written is found out."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def stopper(monkeypatch: pytest.MonkeyPatch) -> Stopper:
    """Sends a signal at the n-th safe point of a run."""
    from tests.support.runs import Stopper

    return Stopper(monkeypatch)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models and data to train on."""
    from tests.support.runs import world

    return world(tmp_path_factory.mktemp("folders") / "world")
