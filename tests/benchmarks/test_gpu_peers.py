"""The stage that measures peers on a GPU, at a tiny shape in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import base
from benchmarks.work.cases import DUAL_CLIP, Shape, draw, for_op
from benchmarks.work.judge import judge_for
from benchmarks.work.objectives import clipped, reinforced

ROOT = Path(__file__).parents[2]
STAGE = """
import contextlib, json
from benchmarks.gpu import fake
from benchmarks.gpu.stages import peers

class Context:
    device, place, dry, backend = "cuda", "cpu", True, "triton"
    left = lambda self: 100.0
    row = lambda self, **cells: print(json.dumps(cells), flush=True)
    attempt = lambda self, what: contextlib.nullcontext()

with fake.faked():
    peers.run(Context())
"""


def test_every_kind_of_work_has_a_table_with_its_floor_and_ourselves():
    pytest.importorskip("triton")
    there = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "RLHF_KERNELS_PEERS": ""}
    command = [sys.executable, "-W", "ignore", "-c", STAGE]
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    works = {row["work"] for row in rows}
    assert len(works) == 7
    for work in works:
        group = {row["contender"]: row for row in rows if row["work"] == work}
        ours = [row for row in group.values() if row["side"] == "ours"]
        assert len(ours) == 1
        assert ours[0]["verdict"] == "ok"
        assert ours[0]["errors"]
        assert ours[0]["over_floor"] > 0
        assert {"ms", "least", "most", "rounds", "extra_mb"} <= ours[0].keys()
        assert group["torch, materialised"]["verdict"] == "ok"
        for row in group.values():  # whoever is not there is named
            assert row.get("verdict") == "ok" or row["skipped"], row
    assert any(row["contender"] == "Liger score centering" for row in rows if row["work"] == "PPO")


def test_a_contender_that_runs_out_of_memory_is_a_row(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu.stages import peers

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    calls = []

    def step():
        calls.append(0)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    guarded = peers.Guarded(step)
    for _ in range(4):
        guarded()
    assert len(calls) == 2
    row = {"contender": "x", "side": "peer", "verdict": "ok", "median_s": 1.0}
    assert "9 GiB" in peers.cells(row, guarded.failed)["verdict"]
    assert "failed" not in peers.cells(row, guarded.failed)  # a peer's failure is not ours
    assert "9 GiB" in peers.cells(row | {"side": "ours"}, guarded.failed)["failed"]
    contender = base.Contender("x", "peer", lambda batch: step)
    batch = draw(Shape(64, 32, 100), torch.float32)[0]
    row, left = peers.first_calls(contender, batch, lambda result: ({}, "ok"))
    assert left is None
    assert peers.cells(row, "")["verdict"].startswith("failed: OutOfMemoryError: CUDA out of memory")


def test_a_loss_with_the_same_gradient_is_held_to_its_own_value():
    """Liger's score centering: PPO's gradient, and -A w logp as its value."""
    drawn = draw(Shape(256, 32, 500), torch.float32)
    batch, _ = for_op("sparse", *drawn)
    judge, _ = judge_for("sparse", batch, drawn[1], None)
    logp = drawn[1].logp.clone().requires_grad_()
    ratio = (logp - batch.old_logp).exp()
    assert ratio.max() < DUAL_CLIP
    weight = ratio.detach()
    (by_hand,) = torch.autograd.grad(-(batch.advantages * weight * logp * batch.kept).sum() / batch.kept.sum(), logp)
    (right,) = torch.autograd.grad(clipped(logp, None, batch), logp)
    torch.testing.assert_close(by_hand, right)

    def through(value):
        def forward(hidden, weight):
            found = (hidden @ weight.t()).log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
            same = clipped(found, None, batch)
            return same + (reinforced(found, None, batch) - same).detach(), None

        return base.training(batch, forward, outputs=lambda: {"value": value})()

    assert judge(through(reinforced))[1] == "ok"
    assert judge(through(None))[1] == "wrong: loss"
