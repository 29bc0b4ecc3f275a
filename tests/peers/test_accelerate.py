"""The loops of docs/integrations.md: with accelerate as without it, in one process and in two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")

from page import defined, examples, shown

EPS = torch.finfo(torch.float32).eps
STEPS = 6  # of the optimizer: three batches, twice each


def trained(micro_batches: int) -> tuple[list[float], torch.nn.Module]:
    names = defined()
    model = names["policy"]()
    return names["train"](model, names["batches"](), micro_batches), model


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Up to what float32 rounds in six updates, and 1e-5 of the updates themselves."""
    before = defined()["policy"]().state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        moved = (x - before[name]).norm()
        assert moved > 0
        assert (ours[name] - x).norm() <= 100 * EPS * moved + STEPS * EPS * x.norm(), name


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_loop_with_accelerate_is_the_plain_one(micro_batches: int) -> None:
    names, (losses, plain) = defined(), trained(micro_batches)
    model = names["policy"]()
    again = names["train_accelerated"](model, names["batches"](), micro_batches)
    assert again == pytest.approx(losses, rel=100 * EPS)
    same_weights(model.state_dict(), plain.state_dict())


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, world = Path(__file__).with_name("accelerate_rank.py"), {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common = os.environ | world | {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    losses, plain = trained(1)
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt")
        assert saved["losses"] == pytest.approx(losses, rel=100 * EPS)
        same_weights(saved["weights"], plain.state_dict())


def test_both_loops_are_short() -> None:
    plain = next(e.source for e in examples() if e.source.startswith("def train"))
    assert max(plain.count("\n"), shown("The same with accelerate").count("\n")) <= 60
