"""The CUDA extension: built where there is an nvcc, for every chip, without spills; and it imports without a driver."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
NO_NVCC = {"PATH": os.path.dirname(shutil.which("c++") or "/usr/bin/c++") + ":/usr/bin:/bin", "CUDA_HOME": "/none"}


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The extension for CUDA alone, as an install would build it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    clean = {name: value for name, value in os.environ.items() if name not in ("NVCC", "CUDA_HOME")}
    return subprocess.run(
        command, cwd=ROOT, env=clean | {"RLHF_KERNELS_EXT": "0"} | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed module, or one built now."""
    spec = importlib.util.find_spec("rlhf_kernels._cuda")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    done = build(folder, RLHF_KERNELS_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("rlhf_kernels/_cuda*.so"))


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def test_code_for_every_chip_and_for_those_to_come(extension: Path):
    assert set(re.findall(r"sm_\d+(?=\.cubin)", cuobjdump("-lelf", str(extension)))) == {"sm_80", "sm_90", "sm_100"}
    assert re.findall(r"sm_\d+(?=\.ptx)", cuobjdump("-lptx", str(extension))) == ["sm_100"]


def test_nothing_spills(extension: Path):
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage", str(extension)))
    assert len(usage) == 12, "two kernels of two dtypes on three chips"
    for registers, stack, shared, local in (map(int, kernel) for kernel in usage):
        assert stack == local == 0
        assert shared < 48 * 1024
        assert registers <= 128, "two blocks of 256 threads on a multiprocessor"


def test_imports_and_says_so_without_a_driver(extension: Path):
    """In a process of its own and by itself: no toolkit, no driver and no torch is needed to import it."""
    code = (
        f"import sys; sys.path.insert(0, {str(extension.parent)!r})\n"
        "import _cuda; print(_cuda.devices())\n"
        "try: _cuda.gae(False, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1.0, 1.0, 0.0, False, 0, 0)\n"
        "except RuntimeError as error: print(error)\n"
    )
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, error = done.stdout.splitlines()
    assert count == "0"
    assert "driver" in error or "device" in error


def test_the_front_door_loads_neither_cuda_nor_triton():
    code = "import sys, rlhf_kernels; print([name for name in sys.modules if 'triton_gae' in name or '_cuda' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "rlhf_kernels" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({**NO_NVCC}, 0, "WITHOUT its CUDA extension; .*no nvcc found"),
        ({**NO_NVCC, "RLHF_KERNELS_CUDA": "1"}, 1, "no nvcc found"),
        ({"NVCC": "false"}, 0, "WITHOUT its CUDA extension; .*false --list-gpu-code"),
        ({"RLHF_KERNELS_CUDA": "0"}, 0, "^$"),
    ],
    ids=["no nvcc", "insisted", "broken nvcc", "switched off"],
)
def test_what_is_said_without_it(tmp_path: Path, environment: dict[str, str], code: int, said: str):
    pytest.importorskip("pybind11")
    if "PATH" in environment and shutil.which("nvcc", path=environment["PATH"]):
        pytest.skip("nvcc lies beside the compiler")
    done = build(tmp_path, **environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(said, (done.stdout + done.stderr).strip()), done.stdout + done.stderr
    assert not list(tmp_path.rglob("_cuda*.so"))


def test_an_nvcc_named_by_hand_is_the_one_that_runs(tmp_path: Path):
    pytest.importorskip("pybind11")
    done = build(tmp_path, NVCC="no-such-nvcc", RLHF_KERNELS_CUDA="1")
    assert done.returncode == 1
    assert "no-such-nvcc" in done.stdout + done.stderr
