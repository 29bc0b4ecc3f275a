"""What all tests share: backends, dtypes, and memory that is poisoned before use."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk

BACKENDS = ("eager", "native")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:rlhf_kernels runs on the backend 'eager'")  # no compiler, no _C


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the CPU; native is skipped only where the extension was not built."""
    reason = rk.backends()[request.param]
    if reason != "ok":
        assert request.param == "native", f"{request.param} must run everywhere: {reason}"
        pytest.importorskip("rlhf_kernels._C", reason=reason)
        pytest.fail(f"the extension is there, and yet: {reason}")
    return request.param


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
