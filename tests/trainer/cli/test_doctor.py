"""`rlhf-train doctor`: advice follows from what was found, and what is found here is true."""

from __future__ import annotations

import math
import os
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from trainer.cli import doctor, machine
from trainer.cli import program as cli
from trainer.cli.doctor import advice, screen
from trainer.cli.machine import Machine

FINE = Machine(
    versions={"python": "3.11.7", "torch": "2.13.0", "rlhf_kernels": "0.1.0"} | dict.fromkeys(doctor.OPTIONAL, "1.0"),
    backends={"eager": "ok", "native": "ok", "triton": "no GPU"}, gpus=[], cores=4, quota=None, load=0.1, threads=4,
    memory=32.0, free_memory=30.0, free_disk=100.0, folder="runs", bfloat16=1.1,
)  # fmt: skip


def told(**found: object) -> str:
    return " ".join(a.text for a in advice(FINE._replace(**found)))


def test_a_good_machine_gets_little_advice():
    (only,) = advice(FINE)
    assert "There is no GPU" in only.text
    assert not only.blocking
    assert not [*advice(FINE._replace(gpus=["A GPU"], backends={"eager": "ok", "native": "ok", "triton": "ok"}))]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"backends": {"eager": "ok", "native": "no compiler"}}, "C++ kernels do not run here (no compiler)"),
        ({"gpus": ["A GPU"]}, "GPU runs on plain torch (triton: no GPU). Run: pip install"),
        ({"quota": 1.5}, "4 threads on 1.5 granted processors wait for each other: use --threads 1."),
        ({"load": 9.0}, "Other jobs are running (load 9.0 on 4 processors)"),
        ({"bfloat16": 0.2}, "bfloat16 is 5.0 times slower"),
        ({"bfloat16": 4.0}, "bfloat16 is 4.0 times faster than float32 here: use --precision bfloat16."),
        ({"free_disk": 1.0}, "Only 1.0 GB are left on the disk of runs"),
        ({"free_memory": 0.5}, "--max-tokens"),
        ({"versions": FINE.versions | {"pyarrow": ""}}, "pip install pyarrow"),
    ],
)
def test_each_finding_has_its_advice(found: dict[str, object], words: str):
    assert words in told(**found)
    assert words not in told()


def test_what_stops_training_comes_first():
    broken = FINE._replace(versions=FINE.versions | {"transformers": "", "yaml": ""}, free_disk=1.0)
    first, *rest = advice(broken)
    assert first.blocking
    assert "No stage can run without transformers, pyyaml. Run: pip install" in first.text
    assert not any(a.blocking for a in rest)
    assert "MUST: No stage can run without transformers" in screen(broken, [first, *rest])


def test_what_is_found_here_is_true(tmp_path: Path):
    found = machine.examine(tmp_path / "not" / "yet")
    assert found.versions["torch"] == torch.__version__
    assert found.backends == rk.backends()
    if found.backends["native"] == "ok":
        assert f"ok, {import_module('rlhf_kernels._C').isa()}\n" in screen(found, [])
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.free_disk == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.05)
    assert 0 < found.free_memory <= found.memory
    assert found.threads == torch.get_num_threads()
    assert found.bfloat16 > 0
    assert max(map(len, screen(found, [*advice(found)]).splitlines())) <= 80


def test_limits_of_a_control_group(tmp_path: Path):
    assert machine.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.quota(tmp_path) == 1.5


def test_memory_is_that_of_the_container(tmp_path: Path):
    """Whose kernel tells about the host; what the group keeps of files that it has read can be had back."""
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    assert all(map(math.isnan, machine.memory_of(meminfo, group)))
    meminfo.write_text("MemTotal: 62500000 kB\nMemFree: 1 kB\nMemAvailable: 31250000 kB\nHugePages_Total: 0\n")
    assert machine.memory_of(meminfo, group) == (64.0, 32.0)
    group.mkdir()
    (group / "memory.current").write_text("3000000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000000000\nactive_file 5\n")
    (group / "memory.max").write_text("max\n")
    assert machine.memory_of(meminfo, group) == (64.0, 32.0)
    (group / "memory.max").write_text("8000000000\n")
    assert machine.memory_of(meminfo, group) == (8.0, 6.0)
    (group / "memory.max").write_text("90000000000\n")  # more than there is
    assert machine.memory_of(meminfo, group) == (64.0, 32.0)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in ("Software", "Machine", "Kernels", "What to do", "eager"):
        assert word in shown
    monkeypatch.setattr(doctor, "examine", lambda out: FINE._replace(versions={"python": "3.11"}))
    assert cli.main(["doctor"]) == 1
    assert "MUST" in capsys.readouterr().out
