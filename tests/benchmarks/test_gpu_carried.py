"""What is made beforehand for a run on a GPU, and how the run finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.contenders.loading import FOLDERS
from benchmarks.gpu.ahead import carried, compiled, prepare

ROOT = Path(__file__).parents[2]
KERNEL = """
import torch, triton, triton.language as tl
from benchmarks.gpu.ahead import carried, compiled

@triton.jit
def scale(x, out, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * FACTOR, mask=i < n)

def launched(factor, n=1000):
    x = torch.zeros(n)
    with compiled.launched((9, 0)) as found:
        scale[(2,)](x, torch.empty_like(x), n, FACTOR=factor, BLOCK=512)
    return found
"""
HERE = """
import sys, json, pathlib, os
folder = pathlib.Path(sys.argv[1])
os.environ["TRITON_CACHE_DIR"] = str(folder)
import kernel
key = kernel.carried.triton_key()
kernel.carried.agree(key)
found = kernel.launched(2.0)
(folder / "about.json").write_text(json.dumps({"key": key, "kernels": 1}))
print(json.dumps(found))
"""
THERE = """
import sys, json, pathlib
import kernel, triton.runtime.cache
triton.runtime.cache.triton_key = lambda: "of a library that was built for another Python"
used = kernel.carried.use(pathlib.Path(sys.argv[1]))
print(json.dumps([used, kernel.launched(2.0), kernel.launched(3.0), kernel.launched(2.0, 1024)]))
"""


def ran(program: str, folder: Path, *arguments: Path) -> Any:
    path = os.pathsep.join([str(ROOT), str(folder)])
    there = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_launch_elsewhere_finds_what_was_compiled_ahead(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "here" / "triton").mkdir(parents=True)
    ((name, hit),) = ran(HERE, tmp_path, tmp_path / "here" / "triton").items()
    assert name.startswith("scale ")
    assert not hit
    (tmp_path / "here").rename(tmp_path / "there")  # on another machine nothing is where it was
    used, same, other, aligned = ran(THERE, tmp_path, tmp_path / "there")
    assert used["triton"]["kernels"] == 1
    assert used["wheels"] == used["ext"] == "none carried"
    assert same == {name: True}
    assert list(other.values()) == list(aligned.values()) == [False]  # what was not compiled is not found
    about = tmp_path / "there" / "triton" / carried.ABOUT
    about.write_text(json.dumps({"key": "3.7.0-0"}))
    used, same, *_ = ran(THERE, tmp_path, tmp_path / "there")
    assert used["triton"]["not used"].startswith("of another Triton: 3.7.0-0 there")
    assert list(same.values()) == [False] or name not in same


def test_wheels_are_unpacked_without_folders_named_like_ours(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDERS, "before")
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "carried" / "wheels"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "one-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one_of_the_peers/__init__.py", "NAME = 'one'")
        wheel.writestr("tests/__init__.py", "")
        wheel.writestr("one-1.2.dist-info/METADATA", "Name: one")
    assert carried.use(tmp_path / "carried") == {"wheels": ["one-1.2"], "ext": "none carried", "triton": "none carried"}
    unpacked = Path(os.environ[FOLDERS].split(os.pathsep)[1])
    assert sorted(path.name for path in unpacked.iterdir()) == ["one-1.2.dist-info", "one_of_the_peers"]
    assert __import__("one_of_the_peers").NAME == "one"
    assert sys.path[-1] == str(unpacked)
    del sys.modules["one_of_the_peers"]


def test_an_extension_of_another_python_is_named(tmp_path):
    (tmp_path / "ext").mkdir()
    (tmp_path / "ext" / "_cuda.cpython-299-x86_64-linux-gnu.so").write_bytes(b"")
    found = carried.use(tmp_path)["ext"]
    assert found.startswith("not used: ImportError: none is for this Python, there is _cuda.cpython-299")


def test_nothing_is_computed_with_large_tensors():
    with compiled.Idle():
        x = torch.randn(3000, 2000, requires_grad=True)
        small = torch.ones(3)
        product = x @ x.t()
        assert product.shape == (3000, 3000)
        (g,) = torch.autograd.grad(product.sum(), x)
        assert g.shape == x.shape
        assert product.add_(1.0) is product
        assert product[5:7].data_ptr() == product.data_ptr() + 5 * 3000 * 4
        assert product.sum() == 0
        assert product.float().mean(1).shape == (3000,)
        assert torch.randn(3).ne(0).all()
        assert torch.empty(7, dtype=torch.int64).eq(0).all()
        assert (small + small).tolist() == [2.0, 2.0, 2.0]


def test_what_cannot_be_made_is_said_and_the_rest_is_made(tmp_path, monkeypatch, capfd):
    def run(command, **_):
        name = command[command.index("-d") + 1] if "-d" in command else None
        if name is None:
            return SimpleNamespace(returncode=1, stdout="", stderr="")
        Path(name, "one-1-py3-none-any.whl").write_bytes(bytes(3_000_000))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    given = [str(tmp_path / "made"), "--only", "wheels", "--only", "ext", "--python", "3.99"]
    assert prepare.main(given) == 1
    said = capfd.readouterr().out
    assert "ext: there is no Python 3.99 with its headers here" in said
    assert "wheels: 3.0 MB" in said


@pytest.mark.parametrize("given", [["--chips", "sm_90,sm_1"], ["--only", "all"], ["--stages", "tests"]])
def test_what_prepare_does_not_know_is_named(given, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(tmp_path), *given])
    assert stopped.value.code == 2
    assert "argument" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
