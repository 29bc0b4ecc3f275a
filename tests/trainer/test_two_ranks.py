"""torchrun: two processes train what one trains, and what they leave when they are killed, one process finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.commands import command
from tests.support.runs import config, world
from tests.support.runs import train as run_stage
from tests.support.small import lines
from tests.support.spread_runs import CASES, sampled
from trainer.cli.program import main

ROOT = Path(__file__).parents[2]
QUICK, LONG = ("sft", "ppo"), ("reward", "shared", "grpo", "dpo", "kto")
SECONDS = 60


def torchrun(*what: str) -> subprocess.Popen:
    """Two ranks of a module of this repository, in a process group of their own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *what]
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill(process: subprocess.Popen) -> None:
    """The launcher and, since they are no group, the workers that it has started."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen) -> None:
    try:
        told, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, told.decode()[-3000:]


def same_weights(one: Path, other: Path) -> None:
    names = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert names == sorted(p.relative_to(other) for p in other.rglob("*.safetensors"))
    assert names
    for name in names:
        right, got = load_file(one / name), load_file(other / name)
        for key, x in right.items():
            assert float((x - got[key]).abs().max()) <= 1e-6, (name, key)


def timeless(line: dict[str, Any]) -> dict[str, float]:
    """Every metric of a step but those that a clock gives; they are of the whole step, whoever did which part."""
    return {k: x for k, x in line.items() if k not in ("stage", "eps") and not k.startswith("timing/")}


def shared_sampling(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Each rank did its share, both have the rollout of one process, bit for bit, and nobody waits for who fails."""
    assert [seen for seen, _ in first["sampled"]] == [[3, 3], [3, 3], [10]]
    assert [seen for seen, _ in second["sampled"]] == [[3, 1], [3, 1], []]
    for case, mine, theirs in zip(CASES, first["sampled"], second["sampled"], strict=True):
        assert mine[1] == theirs[1] == sampled(*case)[1]
    assert first["heard"] == "RuntimeError('rank 1 has failed: ZeroDivisionError: division by zero')"
    assert second["heard"] == "ZeroDivisionError('division by zero')"


@pytest.mark.parametrize(
    "stages", [pytest.param(QUICK, id="-".join(QUICK)), pytest.param(LONG, id="-".join(LONG), marks=pytest.mark.slow)]
)
def test_two_processes_train_and_sample_what_one_does(tmp_path, stages):
    world(tmp_path)
    pair = torchrun("tests.support.spread_runs", str(tmp_path), *stages)
    for stage in stages:
        run_stage(config(stage, tmp_path, tmp_path / f"alone-{stage}"))
    finish(pair)
    for stage in stages:
        alone, spread = tmp_path / f"alone-{stage}", tmp_path / f"spread-{stage}"
        same_weights(alone, spread)
        for mine, theirs in zip(lines(alone / "metrics.jsonl"), lines(spread / "metrics.jsonl"), strict=True):
            assert timeless(theirs) == pytest.approx(timeless(mine), rel=2e-4, abs=1e-5)
        assert (spread / "report.html").exists()
    shared_sampling(*(json.loads((tmp_path / f"sampled-{rank}.json").read_text()) for rank in (0, 1)))


@pytest.mark.parametrize("many", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_on_two_ranks_and_resumed(tmp_path, many):
    """On one; or on two, of which the second reads the checkpoints of the first."""
    world(tmp_path)
    steps = ("--steps", "40", "--save-every", "1")
    run_stage(config("sft", tmp_path, tmp_path / "alone", steps=40))
    pair = torchrun("trainer", *command("sft", tmp_path, tmp_path / "run", *steps))
    until = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "checkpoints" / "latest.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    kill(pair)
    done = len(lines(tmp_path / "run" / "metrics.jsonl"))
    assert 0 < done < 40, "it should have been killed on its way"
    if many == 1:
        assert main(["resume", str(tmp_path / "run")]) == 0
    else:
        finish(torchrun("trainer", "resume", str(tmp_path / "run")))
        assert not (tmp_path / "run" / "checkpoints").exists()
    same_weights(tmp_path / "alone", tmp_path / "run")


def test_what_ranks_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pipeline", "hh"]) == 2
    assert "pipeline: got 2 processes, wants one; torchrun is for sft," in capsys.readouterr().err
