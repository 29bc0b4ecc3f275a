"""A run of the GPU suite that ended early: what its file holds, and how another run goes on from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import fake
from benchmarks.gpu.context import Context

ROOT = Path(__file__).parents[3]


def test_resume_keeps_what_is_done_and_refuses_other_sources(staged, monkeypatch, capsys):
    def fine(ctx: Context) -> None:
        ctx.row(what="once", number=1)

    def bad(ctx: Context) -> None:
        raise ValueError("no")

    old = staged(a=fine, b=bad)["folder"] / "gpu.json"
    runs = []
    found = staged(old=old, a=lambda ctx: runs.append("a"), b=lambda ctx: runs.append("b"))
    assert runs == ["b"]
    assert found["stages"]["a"]["rows"] == [{"what": "once", "number": 1}]
    assert found["stages"]["b"]["status"] == "done"
    monkeypatch.setattr(fake, "NAME", "another GPU")
    staged(old=old, code=2, a=fine)
    assert "its device is 'no GPU: a dry run', here it is 'another GPU'" in capsys.readouterr().err
    changed = json.loads(old.read_text())
    changed["sources"][next(iter(changed["sources"]))] = "0"
    old.write_text(json.dumps(changed))
    staged(old=old, code=2, a=fine)
    said = capsys.readouterr().err
    assert "kernel sources have changed since" in said
    assert len(said.splitlines()) == 1


def test_what_time_has_cut_is_not_done_and_runs_again(staged):
    old = staged(code=0, a=lambda ctx: ctx.cut("the rest"))["folder"] / "gpu.json"
    assert json.loads(old.read_text())["stages"]["a"]["status"] == "partly"
    found = staged(old=old, a=lambda ctx: ctx.row(what="the rest"))
    assert found["stages"]["a"]["status"] == "done"
    assert found["stages"]["a"]["rows"] == [{"what": "the rest"}]


@pytest.mark.parametrize(
    "damage",
    [
        {"about": {}}, {"about": None}, {"stages": []}, {"stages": {"a": {"rows": []}}},
        {"stages": {"a": {"status": "done"}}}, {"stages": {"a": {"status": "done", "rows": [1]}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(staged, capsys, damage):
    old = staged(a=lambda ctx: None)["folder"] / "gpu.json"
    old.write_text(json.dumps(json.loads(old.read_text()) | damage))
    staged(old=old, code=2, a=lambda ctx: None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "not the file of an earlier run" in said[0]


def test_other_versions_are_refused_and_a_stage_that_never_ended_runs_again(staged, capsys):
    old = staged(a=lambda ctx: None)["folder"] / "gpu.json"
    content = json.loads(old.read_text())
    content["stages"]["a"] |= {"status": "running", "until": 0.0}
    old.write_text(json.dumps(content))
    assert staged(old=old, a=lambda ctx: None)["stages"]["a"]["status"] == "done"
    found = staged(old=old, b=lambda ctx: None)["stages"]
    assert found["a"]["status"] == "stopped"
    assert "until" not in found["a"]
    content["about"]["torch"] = "1.0"
    old.write_text(json.dumps(content))
    staged(old=old, code=2, a=lambda ctx: None)
    assert "its torch is '1.0'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=str)
def test_a_signal_leaves_a_whole_file_and_no_program(tmp_path, number):
    """Not even the one that a stage has begun, which is a session of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    words = ["--dry", "--seconds", "60", "--stages", "sanitize", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    begun = tmp_path / "sanitize-nothing.log"
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"]["sanitize"]["status"] == "failed"
    begun_by_it = ["pgrep", "-f", "benchmarks.gpu.stages.small --few"]
    assert not subprocess.run(begun_by_it, capture_output=True, text=True).stdout
