"""`pytest benchmarks/` where there is a GPU: every line of it runs, on the CPU, under the name of the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import fake
from benchmarks.measure import place
from benchmarks.suite import head
from benchmarks.work.cases import HEAD_OPS

ROOT = Path(__file__).parents[2]
CHOSEN = "(sft-fp32 and (rk.sft or GEMM)) or rk.gae or test_update[ours]"


def pytest_of(what: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", what, "--benchmark-only", "-q", "-p", "no:cacheprovider", *options]
    # a worker of xdist tells its children that they are workers too, and those do not measure
    clean = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    clean |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_gpu_is_measured_where_there_is_one(tmp_path):
    out = tmp_path / "rows.json"
    pretend = ("-p", "tests.support.pretended_gpu")
    done = pytest_of("benchmarks/", *pretend, "--device", "cuda", "-k", CHOSEN, "--table-out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    found = json.loads(out.read_text())
    assert found["environment"]["device"] == fake.NAME
    assert fake.NAME in done.stdout
    assert "byte budget 1621 MiB" in done.stdout
    rows = {row["contender"]: row for row in found["rows"]}
    assert set(rows) == {"bare GEMM, 3 products", "rk.sft_loss", "rk.gae"}
    assert all(row["verdict"] == "ok" and row["median_s"] > 0 and "extra_bytes" in row for row in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="cuda: torch sees no GPU here; cpu measures the processor"):
        place.chosen("cuda")
    assert place.chosen("auto") == place.chosen("cpu") == "cpu"


def test_who_comes_too_late_is_left_out_by_name():
    done = pytest_of("benchmarks/suite/gae.py", "--device", "cpu", "--minutes", "1e-6", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" not in done.stdout
    assert "time is over" in done.stdout


def test_the_small_grid_leaves_out_what_takes_minutes():
    usual, slow = head.grid(False), head.grid(False, slow_halves=True)
    assert [str(c) for c in slow if c.dtype == "fp32"] == [str(c) for c in usual if c.dtype == "fp32"]
    halves = [c for c in slow if c.dtype == "bf16"]
    assert {c.op for c in halves if c.contender.side == "ours"} == set(HEAD_OPS)
    assert {c.op for c in halves if c.contender.side != "ours"} == set(head.WITHOUT_BACKWARD)
    gpu = head.grid(False, "cuda")
    assert gpu[0].dtype == "bf16"
    assert {c.op for c in gpu if c.dtype == "bf16" and c.contender.side == "peer"} == set(HEAD_OPS)
    assert len(head.grid(True, "cuda")) == len(head.grid(True)) > 3 * len(usual)
