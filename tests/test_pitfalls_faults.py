"""What goes wrong when machines fail, each named after its number in the design."""

from __future__ import annotations

import dataclasses
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

from tests.fault_worlds import (
    DAMAGES,
    STAGES,
    Stopper,
    config,
    finished,
    flip,
    one_step_at_a_time,
    same_mark,
    stopped_at,
    train,
    world,
)
from tests.trainer_worlds import lines, small_policy
from trainer import cli, run_folder, sft
from trainer.checkpoint import Checkpoints, write_safetensors
from trainer.fingerprint import inputs
from trainer.signals import Terminated


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("faults"))


ROLLOUT = {"ppo": 1 + 2 * 2 * 2 + 1, "shared": 1 + 2 * 2 + 1, "grpo": 1 + 2 * 2 + 1}
UNITS = {"sft": 4, "reward": 4, "ppo": 2 * ROLLOUT["ppo"], "shared": ROLLOUT["shared"], "grpo": 2 * ROLLOUT["grpo"]}


@pytest.mark.parametrize("stage", STAGES)
def test_pitfall_15_resume_bitwise(stage: str, path: Path, tmp_path: Path, stopper: Stopper) -> None:
    """Stopped and resumed at every safe point: every step, between minibatches of a rollout, in mid-pass."""
    whole, pieces = config(stage, path, tmp_path / "whole"), config(stage, path, tmp_path / "pieces")
    train(whole)
    wanted = stopper.mark
    assert one_step_at_a_time(pieces, stopper) == UNITS.get(stage, 3) + 1
    assert wanted is not None
    same_mark(stopper.mark, wanted)
    assert finished(whole.out) == finished(pieces.out)


def test_pitfall_15_what_changed_is_refused_and_shown(path: Path, tmp_path: Path, stopper: Stopper) -> None:
    here = world(tmp_path / "here")
    cfg = config("ppo", here, tmp_path / "out")
    stopped_at(cfg, stopper, 3)
    (here / "prompts.jsonl").rename(here / "moved.jsonl")
    train(dataclasses.replace(cfg, data=here / "moved.jsonl", keep_last=1, save_every=5), resume=True)  # the same data

    stopped_at(cfg := dataclasses.replace(cfg, data=here / "moved.jsonl"), stopper, 3)
    with pytest.raises(ValueError, match=r"is not the run that was saved:\n  lr: 0.0003 at the checkpoint, 0.5 now\n"):
        train(dataclasses.replace(cfg, lr=0.5), resume=True)
    with (here / "moved.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\n')
    small_policy(1).save(here / "base" / "model")
    with pytest.raises(ValueError, match="this is not the run") as refused:
        train(cfg, resume=True)
    for line in (
        r"  data: the contents of .*moved.jsonl have changed \(sha256 \w{12}... then",
        "  model: the contents of",
    ):
        assert refused.match(line)
    assert "  lr" not in str(refused.value)


def test_pitfall_15_every_model_that_an_option_names_is_known(path: Path, tmp_path: Path) -> None:
    base, other = path / "base", tmp_path / "other"
    small_policy(2).save(other / "model")
    cfg = config("grpo", path, tmp_path / "run", reward=(f"a={base},{other}@0.5", "exact_answer"), eval_every=3)
    found = inputs(cfg)
    assert found.keys() == {"model", "data", f"reward ({base})", f"reward ({other})"}
    assert found["model"] == found[f"reward ({base})"] != found[f"reward ({other})"]
    small_policy(3).save(other / "model")
    assert {k for k, v in inputs(cfg).items() if found[k] != v} == {f"reward ({other})"}


def test_pitfall_15_from_the_command_line(path: Path, tmp_path: Path, stopper: Stopper, capfd: Any) -> None:
    """`resume RUN` from another folder, with nothing but the run's; what a stop and a finished run say."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    argv = ["sft", "--model", str(path / "base"), "--data", "sft.jsonl", "--steps", "4", "--batch-size", "4"]
    stopper.at = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        with pytest.raises(Terminated):
            cli.main([*argv, "--out", str(out)])
        stopper.at = None
        assert f"go on with: rlhf-train resume {out}" in (said := capfd.readouterr().err)
        assert "sft: stopped at step 2 of 4; saved" in said
        assert cli.main([*argv, "--out", str(out)]) == 2
        assert f"`rlhf-train resume {out}` goes on with it" in capfd.readouterr().err
        assert cli.main([*argv, "--out", str(whole)]) == 0
    assert cli.main(["resume", str(out), "--lr", "1"]) == 2
    assert "lr: 0.001 at the checkpoint, 1.0 now" in capfd.readouterr().err
    assert cli.main(["resume", str(out), "--keep-last", "1"]) == 0
    assert "sft: resumed at step 2 of 4" in capfd.readouterr().out
    assert finished(out) == finished(whole)
    assert (out / "report.html").exists()
    assert cli.main(["resume", str(out)]) == 0
    assert "nothing to resume" in capfd.readouterr().out
    assert cli.main(["resume", str(path)]) == 2
    assert "holds no run" in capfd.readouterr().err


@pytest.mark.parametrize(("kills", "stages"), [(4, ("ppo", "sft")), pytest.param(50, STAGES, marks=pytest.mark.slow)])
def test_pitfall_16_killed_at_random_moments(kills: int, stages: tuple[str, ...]) -> None:
    root = Path(__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kills", "--kills", str(kills), "--stages", *stages]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60 * kills, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": the same bits\n") == kills


def test_pitfall_16_two_runs_do_not_share_a_folder(path: Path, tmp_path: Path) -> None:
    cfg, refused = config("sft", path, tmp_path / "run"), []

    def again(*args: Any) -> Any:
        for attempt in (lambda: train(cfg), lambda: train(cfg, resume=True), lambda: run_folder.claim(cfg.out)):
            with pytest.raises(ValueError, match="out: another process is training in"):
                attempt()
            refused.append(attempt)
        return loss(*args)

    loss = sft.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "loss", again)
        train(cfg)
    assert len(refused) >= 3
    train(cfg)


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
