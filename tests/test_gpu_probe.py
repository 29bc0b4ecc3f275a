"""The GPU probe runs end to end without a GPU, says what it could not run, and its kernels fit the registers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROBE = Path(__file__).parents[1] / "benchmarks" / "gpu_probe.py"
SECTIONS = ["device", "cublas", "epilogue", "gathered", "second_runtime", "sparse"]


def probe(tmp_path: Path, *only: str, **environment: str) -> dict[str, Any]:
    out = tmp_path / "probe.json"
    command = [sys.executable, str(PROBE), "--device", "cpu", "--out", str(out), "--only", *only]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["device"] == "cpu"
    assert list(report["sections"]) == list(only)
    return report["sections"]


def test_every_section_gives_numbers_or_a_reason(tmp_path: Path):
    sections = probe(tmp_path, *SECTIONS)
    for name, section in sections.items():
        assert "error" not in section
        assert section["cells"], name
        for cell in section["cells"]:
            assert {"ms", "skipped", "error", "python"} & set(cell), (name, cell)
            assert set(cell) != {"error"}, (name, cell)  # an error without a cell around it ended the section
    for name in ("device", "cublas", "gathered"):  # plain torch: on a CPU nothing is missing
        cells = [cell for cell in sections[name]["cells"] if "python" not in cell]
        assert all(cell["n"] == 3 and 0 < cell["min_ms"] <= cell["ms"] <= cell["max_ms"] for cell in cells)
    products = [cell for cell in sections["sparse"]["cells"] if cell["way"] == "embedding_bag"]
    assert {(cell["K"], cell["op"]) for cell in products} == {(K, op) for K in (4, 20) for op in ("dX", "dW")}
    assert all(0 < cell["deviation"]["rows"] < 4e-3 for cell in products)  # bf16 rounding: at most 2^-8


def test_the_interpreted_kernels_agree_with_float64(tmp_path: Path):
    pytest.importorskip("triton")
    sections = probe(tmp_path, "epilogue", "sparse", TRITON_INTERPRET="1")
    products = [cell for cell in sections["sparse"]["cells"] if cell.get("way") == "Triton"]
    assert len(products) == 8  # two sizes, two distributions, both directions
    assert all(cell["deviation"]["rows"] < 1e-6 for cell in products)
    cells = sections["epilogue"]["cells"]
    measured = {(cell["mode"], cell["config"]["TMA"]): cell.get("deviation") for cell in cells if "config" in cell}
    assert set(measured) == {(mode, tma) for mode in ("score", "train", "gemm") for tma in (True, False)}
    for (mode, _), deviation in measured.items():
        assert set(deviation) == {"score": {"logp"}, "train": {"logp", "rows"}, "gemm": {"rows"}}[mode]
        assert all(error < 1e-5 for error in deviation.values())


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(PROBE.parent))
    return importlib.import_module("gpu_probe_kernels")


@pytest.mark.parametrize("mode", ["score", "train"])
@pytest.mark.parametrize(("arch", "tma"), [(80, False), (90, False), (90, True), (100, False), (100, True)])
def test_the_default_tile_spills_nothing(kernels: Any, arch: int, tma: bool, mode: str):
    config = kernels.CONFIGS[0] | kernels.MODES[mode] | {"TMA": tma}
    built = kernels.compile_for(arch, kernels.anchored_gemm_kernel, config)
    assert built["arch"] == f"sm_{arch}"
    assert built["spills"] == built["stack"] == 0
    assert built["registers"] >= 64  # the accumulators are there


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_sparse_product_spills_nothing(kernels: Any, arch: int, add: bool):
    built = kernels.compile_for(arch, kernels.csr_kernel, kernels.CSR | {"ADD": add})
    assert built["spills"] == built["stack"] == 0


def test_a_tile_that_does_not_divide_the_hidden_size_is_refused(kernels: Any):
    x = torch.zeros(4, 100)
    with pytest.raises(ValueError, match="hidden size 100: want a multiple of BLOCK_H = 64"):
        kernels.anchored_gemm(x, x, x[:, 0], kernels.CONFIGS[0] | kernels.MODES["score"] | {"TMA": False})
