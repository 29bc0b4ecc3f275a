"""`rlhf-train doctor`: advice follows from what was found, and what is found here is true."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from trainer import cli, doctor, doctor_probe
from trainer.doctor import Machine, advice, screen

FINE = Machine(
    versions={"python": "3.11.7", "torch": "2.13.0", "rlhf_kernels": "0.1.0"} | dict.fromkeys(doctor.OPTIONAL, "1.0"),
    backends={"eager": "ok", "native": "ok", "triton": "no GPU"}, gpus=[], cores=4, quota=None, load=0.1, threads=4,
    spin="GOMP_SPINCOUNT=1000", memory=32.0, free_memory=30.0, free_disk=100.0, folder="runs",
    matmul={"float32": 100.0, "bfloat16": 110.0}, region=(0.01, 0.012),
)  # fmt: skip


def told(**found: object) -> str:
    return " ".join(a.text for a in advice(FINE._replace(**found)))


def test_a_good_machine_gets_little_advice():
    (only,) = advice(FINE)
    assert "No GPU" in only.text
    assert not only.blocking
    assert advice(FINE._replace(gpus=["A GPU"], backends={"eager": "ok", "native": "ok", "triton": "ok"})) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"backends": {"eager": "ok", "native": "no compiler"}}, "C++ kernels do not run here (no compiler)"),
        ({"gpus": ["A GPU"]}, "GPU runs on plain torch (no GPU)"),
        ({"quota": 1.5}, "4 threads on 1.5 granted processors wait for each other: --threads 1"),
        ({"region": (0.01, 6.0)}, "costs 6.00 ms here"),
        ({"load": 9.0}, "Other jobs are running (load 9.0 on 4 processors)"),
        ({"matmul": {"float32": 100.0, "bfloat16": 20.0}}, "bfloat16 is 5.0 times slower"),
        ({"matmul": {"float32": 100.0, "bfloat16": 400.0}}, "bfloat16 is 4.0 times faster"),
        ({"free_disk": 1.0}, "1.0 GB left on the disk of runs"),
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
    assert "transformers, pyyaml missing: pip install" in first.text
    assert not any(a.blocking for a in rest)
    assert "MUST: transformers" in screen(broken, [first, *rest])


def test_what_is_found_here_is_true(tmp_path: Path):
    machine = doctor_probe.examine(tmp_path / "not" / "yet")
    assert machine.versions["torch"] == torch.__version__
    assert machine.backends == rk.backends()
    if machine.backends["native"] == "ok":
        assert f"ok, {import_module('rlhf_kernels._C').isa()}\n" in screen(machine, [])
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.free_disk == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.05)
    assert 0 < machine.free_memory <= machine.memory
    assert machine.threads == torch.get_num_threads()
    assert all(speed > 0 for speed in machine.matmul.values())
    assert max(map(len, screen(machine, advice(machine)).splitlines())) <= 80


def test_limits_of_a_control_group(tmp_path: Path):
    assert doctor_probe.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor_probe.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor_probe.quota(tmp_path) == 1.5


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in ("Software", "Machine", "Kernels", "What to do", "eager"):
        assert word in shown
    monkeypatch.setattr(doctor_probe, "examine", lambda out: FINE._replace(versions={"python": "3.11"}))
    assert cli.main(["doctor"]) == 1
    assert "MUST" in capsys.readouterr().out
