"""The GPU suite's dry run: every line of it, where there is no GPU; and what no other test of the kernels asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_kernels as rk
from benchmarks import gpu
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import fake, runner
from benchmarks.gpu.context import Context
from benchmarks.gpu.record import Record
from rlhf_kernels.backends.triton import table

ROOT = Path(__file__).parents[3]


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_stage_runs_dry(tmp_path):
    out = tmp_path / "out"
    done = suite("--dry", "--seconds", "480", "--out", str(out))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads((out / "gpu.json").read_text())
    assert {name: stage["status"] for name, stage in found["stages"].items()} == dict.fromkeys(gpu.STAGES, "done")
    for name, stage in found["stages"].items():
        assert stage["rows"], name
        for row in stage["rows"]:
            assert "failed" not in row, row
            assert row.get("ok") is not False, row
            assert "no time was left" not in str(row), row
            assert "rlhf_kernels" not in str(row.get("skipped")), row  # what is ours is there to be run
    assert found["about"]["dry"] is True
    assert found["sources"]
    lines = done.stdout.splitlines()
    ours = lines[lines.index(next(line for line in lines if line.startswith("device="))) :]
    assert len(ours) <= 60
    assert (out / "gpu.log").read_text().splitlines()[-len(ours) :] == ours
    assert all(any(line.startswith(f"{name}: done") for line in ours) for name in gpu.STAGES)


def test_a_crash_is_noted_and_the_others_go_on(staged):
    def bad(ctx: Context) -> None:
        ctx.row(what="before", number=torch.tensor(1.5))
        with ctx.attempt("this"):
            raise ValueError("first line\nsecond line")
        with ctx.attempt("that"):
            import a_package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401
        raise KeyError("x")

    def good(ctx: Context) -> None:
        ctx.row(what="fine")

    found = staged(bad=bad, good=good)
    assert found["stages"]["bad"]["status"] == "failed"
    assert found["stages"]["bad"]["why"] == "KeyError: 'x'"
    first, this, that = found["stages"]["bad"]["rows"]
    assert first == {"what": "before", "number": 1.5}
    assert this == {"what": "this", "failed": "ValueError: first line"}
    assert that["skipped"].startswith("ModuleNotFoundError: No module named 'a_package")
    assert found["stages"]["good"]["status"] == "done"
    assert command.conclude(Record(found["folder"]), ["bad", "good"]) == 1


def test_a_stage_that_does_not_look_at_its_deadline_is_stopped(staged, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.2)
    seen = []

    def hangs(ctx: Context) -> None:
        with ctx.attempt("which swallows no watchdog"):
            time.sleep(60)

    def after(ctx: Context) -> None:
        seen.append(ctx.left())

    found = staged(4.0, hangs=hangs, after=after)
    assert found["stages"]["hangs"]["status"] == "stopped"
    assert 1.9 < found["stages"]["hangs"]["seconds"] < 3.5
    assert found["stages"]["after"]["status"] == "done"
    assert 0 < seen[0] < 2.1


def test_seconds_that_a_stage_leaves_go_to_those_after_it(staged):
    given = {}

    def stage(ctx: Context) -> None:
        given[ctx.name] = ctx.left()

    staged(40.0, a=stage, b=stage)
    assert given["a"] < 21
    assert given["b"] > 30


def test_a_broken_device_ends_the_process_and_only_the_stage(staged, monkeypatch):
    def breaks(ctx: Context) -> None:
        def synchronize() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        torch.cuda.synchronize = synchronize  # as after such an access: every later call raises
        with ctx.attempt("a kernel"):
            torch.cuda.synchronize()

    found = staged(code=1, breaks=breaks, after=lambda ctx: None)
    assert "answers no more" in found["stages"]["breaks"]["why"]
    assert "after" not in found["stages"]  # which another process will run


@pytest.mark.parametrize(
    ("capability", "entry"),
    [((9, 0), "that of 9.0"), ((7, 5), "the conservative one"), ((11, 0), "that of 10.0, borrowed")],
)
def test_a_chip_that_is_not_listed_runs_and_says_whose_entry_it_has(staged, monkeypatch, capability, entry):
    monkeypatch.setattr(fake, "CAPABILITY", capability)
    table._unlisted.cache_clear()

    def scores(ctx: Context) -> None:
        from benchmarks.gpu.stages.shapes import listed, using

        with using(listed(ctx)), torch.no_grad():
            stats = rk.token_stats(torch.randn(3, 16), torch.randn(40, 16), torch.arange(3), backend=ctx.backend)
        ctx.row(what="scoring", ok=bool(stats.logp.isfinite().all()))

    found = staged(scores=scores)
    assert found["about"]["capability"] == "{}.{}".format(*capability)
    assert found["about"]["entry"].startswith(entry)
    assert found["stages"]["scores"]["rows"] == [{"what": "scoring", "ok": True}]


def test_warnings_are_counted_and_fail_nothing(staged):
    import warnings

    def warns(ctx: Context) -> None:
        for _ in range(3):
            warnings.warn("look here", stacklevel=1)

    found = staged(warns=warns)
    assert "warned 3 times, UserWarning: look here" in (found["folder"] / "gpu.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x", "--stages", "head,haed"], "argument --stages: there is no stage 'haed'"),
        (["--out", "x", "--seconds", "soon"], "argument --seconds: got 'soon', wants a number"),
        (["--out", "x", "--seconds", "nan"], "argument --seconds: got 'nan', wants a number"),
        (["--out", "x", "--resume", "nowhere.json"], "argument --resume: there is no file 'nowhere.json'"),
        (["--out", __file__], "is not a folder"),
        (["--out", f"{__file__}/sub"], "cannot be written to"),
        (["--out", "x", "--carried", "."], "it is not what prepare has made"),
        (["--out", "x", "--carried", "nowhere"], "argument --carried: there is no folder 'nowhere'"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_bad_values_give_one_clear_error(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_process_that_dies_costs_its_stage(tmp_path, monkeypatch):
    """The parent notes it, and another process runs the rest."""
    calls = []

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

    def watched(process: Process, folder: Path, until: float) -> int:
        calls.append(1)
        record = Record(folder)
        record.content.setdefault("about", {})
        if len(calls) == 1:
            record.begin("ceilings", 10.0)
            return -11
        record.begin("gae", 10.0)
        record.end("gae", "done")
        return 0

    monkeypatch.setattr(command.subprocess, "Popen", Process)
    monkeypatch.setattr(command, "watched", watched)
    assert command.main(["--out", str(tmp_path), "--stages", "gae,ceilings"]) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["ceilings"]["why"] == "its process ended with status -11"
    assert stages["gae"]["status"] == "done"
    assert len(calls) == 2


def test_a_target_that_is_no_column_poisons_its_own_row_alone():
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    targets = torch.tensor([3, 40, 7, 0, 39])
    stats = rk.token_stats(hidden, weight, targets, backend="triton", checks=False)
    assert stats.logp.isnan().tolist() == [False, True, False, False, False]
    assert stats.entropy.isnan().tolist() == [False, True, False, False, False]


def test_a_row_of_nan_stays_alone():
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    hidden[2] = torch.nan
    stats = rk.token_stats(hidden, weight, torch.arange(5), backend="triton", checks=False)
    assert stats.logp.isnan().tolist() == [False, False, True, False, False]


def test_float64_is_refused_by_name():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'triton' computes in float32"):
        rk.token_stats(x, torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), backend="triton")


def test_an_unlisted_chip_gets_the_conservative_entry_and_one_notice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=r"compute capability 7\.5"):
        assert table.entry(torch.device("cuda")) is table.CONSERVATIVE
    assert table.entry(torch.device("cuda")) is table.CONSERVATIVE  # and no second warning, which would be an error
