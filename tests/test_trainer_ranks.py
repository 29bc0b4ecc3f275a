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
import torch
from safetensors.torch import load_file

from tests.fault_worlds import config, world
from tests.fault_worlds import train as run_stage
from tests.spread_runs import CASES, sampled
from tests.trainer_commands import command
from tests.trainer_worlds import lines
from trainer import ranks
from trainer.cli import main
from trainer.packing import split

ROOT = Path(__file__).parent.parent
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
    pair = torchrun("tests.spread_runs", str(tmp_path), *stages)
    for stage in stages:
        run_stage(config(stage, tmp_path, tmp_path / f"alone-{stage}"))
    finish(pair)
    for stage in stages:
        alone, spread = tmp_path / f"alone-{stage}", tmp_path / f"spread-{stage}"
        same_weights(alone, spread)
        for mine, theirs in zip(lines(alone / "metrics.jsonl"), lines(spread / "metrics.jsonl"), strict=True):
            assert mine.keys() == theirs.keys()
            assert mine["loss" if "loss" in mine else "objective/scores"] == pytest.approx(
                theirs["loss" if "loss" in theirs else "objective/scores"], rel=1e-4, abs=1e-5
            )
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


def test_a_rank_takes_every_second_part(monkeypatch):
    assert ranks.share("abc") == [(0, "a"), (1, "b"), (2, "c")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert ranks.share("abc") == [(1, "b")]
    assert len(split([3, 3, 3, 3], max_tokens=100)) == 2, "and there is one for every rank"


def test_alone_nothing_is_summed():
    p = torch.nn.Parameter(torch.ones(2))
    ranks.sum_gradients([p])
    assert p.grad is None
    assert ranks.total({"a": 1.0}) == {"a": 1.0}
    assert ranks.spread("ab", str.upper) == ["A", "B"]
    assert ranks.from_first("x") == "x"
