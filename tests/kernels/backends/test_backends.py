"""Where there is no compiler everything still runs, and says so: when it is built, and when it is used."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk

ROOT = Path(__file__).parents[3]
backends = importlib.import_module("rlhf_kernels.backends")  # whose name is also that of a function of the front door

# What a build needs and tests have not; without a compiler nobody comes so far as to use it.
INSTALL = """
import runpy, sys, sysconfig, types
sys.modules["pybind11"] = types.SimpleNamespace(get_include=lambda: "")
sysconfig.get_config_vars()["CXX"] = ""  # which may be a whole path
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch):
    """A machine on which the extension is missing."""
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: "was not built" if name == "native" else load(name))
    backends._say_once.cache_clear()
    yield
    backends._say_once.cache_clear()


def test_without_the_extension_plain_torch_runs_and_one_warning_says_so(not_built: None):
    head = torch.randn(5, 8), torch.randn(40, 8), torch.arange(5)
    with pytest.warns(UserWarning, match="runs on the backend 'eager': 'native' was not built"):
        got = rk.sft_loss(*head).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.gae(torch.ones(5), torch.ones(5), torch.tensor([0, 5]))
        assert torch.equal(got, rk.sft_loss(*head).loss), "said once, and not again"
    assert torch.equal(got, rk.sft_loss(*head, backend="eager").loss)
    assert rk.backends() == backends.backends() | {"native": "was not built"}
    with pytest.raises(RuntimeError, match="backend: 'native' was not built"):
        rk.sft_loss(*head, backend="native")


@pytest.mark.parametrize(("insists", "code"), [("", 0), ("1", 1)])
def test_an_install_without_a_compiler_says_so(tmp_path: Path, insists: str, code: int):
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    environment |= {"RLHF_KERNELS_EXT": insists, "RLHF_KERNELS_CUDA": "0"}
    command = [sys.executable, "-c", INSTALL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "no C++ compiler found" in said
    assert ("WITHOUT its C++ extension; the eager backend will run" in said) == (code == 0)
    assert not list(tmp_path.rglob("*.so"))
