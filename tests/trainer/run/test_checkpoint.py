"""What goes wrong when machines fail, each named after its number in the design."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.support.runs import (
    DAMAGES,
    STAGES,
    Stopper,
    config,
    finished,
    flip,
    stopped_at,
    train,
)
from tests.support.small import lines
from trainer.cli import program as cli
from trainer.run.checkpoint import Checkpoints
from trainer.run.durable import write_safetensors


@pytest.mark.parametrize(("kills", "stages"), [(4, ("ppo", "sft")), pytest.param(50, STAGES, marks=pytest.mark.slow)])
def test_pitfall_16_killed_at_random_moments(kills: int, stages: tuple[str, ...]) -> None:
    root = Path(__file__).parents[3]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.support.kills", "--kills", str(kills), "--stages", *stages]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60 * kills, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": the same bits\n") == kills


@pytest.mark.parametrize("damage", DAMAGES)
def test_pitfall_16_a_damaged_checkpoint_is_passed_over(
    damage: str, path: Path, tmp_path: Path, stopper: Stopper, capfd: Any
) -> None:
    cfg, whole = config("sft", path, tmp_path / "run", save_every=1), config("sft", path, tmp_path / "whole")
    train(whole)
    found = stopped_at(cfg, stopper, 3)
    assert found.names() == ["step-0000002", "step-0000003"]
    DAMAGES[damage](found.folder / "step-0000003")
    capfd.readouterr()
    train(cfg, resume=True)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-0000003 is passed over: ")
    assert finished(cfg.out) == finished(whole.out)


def test_pitfall_16_leftovers_do_not_confuse(path: Path, tmp_path: Path, stopper: Stopper, capfd: Any) -> None:
    """Half a save, a folder whose pointer never came, a pointer that is gone, and nothing good at all."""
    cfg, whole = config("sft", path, tmp_path / "run", save_every=1), config("sft", path, tmp_path / "whole")
    train(whole)
    found = stopped_at(cfg, stopper, 3)
    folder = found.folder
    (folder / "step-0000004.saving").mkdir()
    (folder / "step-0000004.saving" / "policy.safetensors").write_bytes(b"half")
    (folder / "latest.json").write_text('{"checkpoint": "step-0000002"}')
    chosen = found.latest(print)
    assert chosen is not None
    assert chosen.path.name == "step-0000002"
    (folder / "latest.json").write_text("")
    chosen = found.latest(print)
    assert chosen is not None
    assert chosen.path.name == "step-0000003"
    assert capfd.readouterr().out == ""
    train(cfg, resume=True)
    assert finished(cfg.out) == finished(whole.out)

    found = stopped_at(cfg, stopper, 3)
    for name in found.names():
        flip(folder / name / "policy.safetensors")
    with pytest.raises(ValueError, match="none of its checkpoints is usable"):
        train(cfg, resume=True)


@pytest.mark.parametrize("fatal", range(8))
def test_pitfall_16_a_full_disk_keeps_the_previous_checkpoint(
    fatal: int, path: Path, tmp_path: Path, stopper: Stopper, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Whichever of its eight syncs, up to that of the pointer, meets it: the one before is whole, training goes on."""
    cfg = config("sft", path, tmp_path / "run", save_every=2, steps=5)
    count, armed = 0, False
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal count
        count += armed
        if armed and count > fatal:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    save = Checkpoints.save

    def saved(self: Checkpoints, name: str, *rest: Any) -> None:
        nonlocal armed
        armed = name == "step-0000004"
        try:
            save(self, name, *rest)
        finally:
            armed = False

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Checkpoints, "save", saved)
    monkeypatch.setattr(Checkpoints, "clear", lambda self: None)
    train(cfg)
    assert len(lines(cfg.out / "metrics.jsonl")) == 5
    assert "checkpoint step-0000004 could not be written ([Errno 28] No space left" in capfd.readouterr().err
    chosen = Checkpoints(cfg.out).latest(print)
    assert chosen is not None
    assert chosen.path.name == "step-0000002"
    assert not [p for p in (cfg.out / "checkpoints").iterdir() if p.name.startswith("step-0000004.")]


def test_pitfall_16_a_full_disk_at_the_end(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """There is no room for the model, but there was for a checkpoint; with room again, the run comes to its end."""
    whole, argv = config("sft", path, tmp_path / "whole"), ["sft", "--out", str(tmp_path / "run")]
    train(whole)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {"model": path / "base", "data": path / "sft.jsonl", "eval-data": path / "sft.jsonl", "steps": 4}
    options |= {"batch-size": 4, "max-tokens": 40, "warmup-steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert cli.main([*argv, "--quiet", *(f"--{k}={v}" for k, v in options.items())]) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "sft: failed at step 4 of 4; saved"
    assert said[1].startswith("rlhf-train: go on with: rlhf-train resume ")
    assert said[2].endswith("model could not be written: [Errno 28] No space left on device")
    assert len(said) == 3
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert finished(tmp_path / "run") == finished(whole.out)


def test_pitfall_16_half_a_write(tmp_path: Path) -> None:
    """The system itself ends a write in its middle."""
    found, small, large = Checkpoints(tmp_path), {"x": torch.zeros(4)}, {"x": torch.zeros(400_000)}
    found.save("a", {"n": 1}, {"model": small})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            found.save("b", {"n": 2}, {"model": large})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert found.names() == ["a"]
    assert found.latest(print).state == {"n": 1}  # type: ignore[union-attr]


def test_pitfall_16_only_the_last_stay(tmp_path: Path) -> None:
    found = Checkpoints(tmp_path, keep_last=2)
    for name in "abd":
        found.save(name, {}, {"m": {"x": torch.zeros(2)}})
    assert found.names() == ["b", "d"]
    found.save("c", {}, {})  # the run went back behind d
    assert found.names() == ["b", "c"]
    odd = {
        "bf16": torch.arange(3).bfloat16(), "bool": torch.tensor([True, False, True]), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64), "bytes": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    write_safetensors(tmp_path / "odd.safetensors", odd)
    for name, x in load_file(tmp_path / "odd.safetensors").items():
        assert x.dtype == odd[name].dtype
        assert torch.equal(x, odd[name])
