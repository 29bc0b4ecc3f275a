"""What goes wrong when a run is told to stop, when numbers go bad, when files hold code; each after its number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlhf_kernels as rk
from tests import fault_worlds
from tests.fault_worlds import Stopper, config, finished, stopped_at, train, world
from tests.trainer_worlds import lines
from trainer import cli, sft
from trainer.checkpoint import Checkpoint, Damaged
from trainer.fingerprint import inputs
from trainer.guard import NotFinite
from trainer.models import load_policy
from trainer.signals import Interrupted, Terminated, signals
from trainer.stage import Optimizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("stops"))


@pytest.fixture(scope="module")
def undisturbed(path: Path) -> dict[str, Any]:
    train(cfg := config("ppo", path, path / "undisturbed"))
    return finished(cfg.out)


WHERE = {
    "generation": "trainer.rollout._continue",
    "reward": "tests.fault_worlds.early_letters",
    "scoring": "trainer.models.ScalarModel.values",
    "policy update": "rlhf_kernels.ppo_loss",
    "value update": "rlhf_kernels.value_loss",
    "Adam": "torch.optim.AdamW.step",
    "evaluation": "trainer.watch.Watch.evaluate",
    "logging": "trainer.log.Bar.step",
    "the end": "trainer.models.ScalarModel.save",
}


@pytest.mark.parametrize("where", WHERE)
def test_pitfall_17_signals_save_and_exit(
    where: str, path: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """At its second call a function sends the signal and then takes its time, as generation would."""
    cfg = config("ppo", path, tmp_path / "run")
    number, kind = (signal.SIGINT, Interrupted) if where in ("reward", "Adam") else (signal.SIGTERM, Terminated)
    before, (owner, name) = signal.getsignal(number), found(WHERE[where])
    original, calls = getattr(owner, name), 0

    def hit(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if where == "the end" else 2):
            os.kill(os.getpid(), number)
            if where not in ("Adam", "logging"):  # these are short, and finished first
                time.sleep(20)
        return original(*args, **kwargs)

    signal.signal(number, signal.default_int_handler)  # whatever the shell has asked for
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, hit)
        with pytest.raises(kind) as stop:
            train(cfg)
    assert time.monotonic() - began < 10
    assert kind is Interrupted or stop.value.code == 143  # type: ignore[union-attr]
    assert f"{number.name}: stopping" in (said := capfd.readouterr().err)
    assert re.search(r"ppo: stopped at step \d of 2; saved\n", said)
    assert signal.signal(number, before) == signal.default_int_handler
    train(cfg, resume=True)
    assert finished(cfg.out) == undisturbed


def found(name: str) -> tuple[Any, str]:
    """The owner of a dotted name, and the name in it."""
    owner, _, last = name.rpartition(".")
    return pkgutil.resolve_name(owner), last


def test_pitfall_17_the_second_signal_exits_at_once() -> None:
    code = (
        "import os, signal, time; from trainer.signals import signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with signals.handled():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('going on', flush=True)\n"
        "    os.kill(os.getpid(), signal.{second})\n"
        "    time.sleep(20)\n"
    )
    for second, status in (("SIGINT", 130), ("SIGTERM", 143)):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{second}", second)],
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
        )
        assert (done.returncode, done.stdout) == (status, "going on\n"), done.stderr


def test_pitfall_17_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled(), signals.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            signals.check()
    except Interrupted:  # which would end the tests, not this one
        pytest.fail("nohup is not respected")
    finally:
        signal.signal(signal.SIGINT, before)


def test_pitfall_17_a_reward_that_fails_loses_nothing(path: Path, tmp_path: Path, capfd: Any) -> None:
    whole, cfg = config("grpo", path, tmp_path / "whole"), config("grpo", path, tmp_path / "run")
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fault_worlds, "early_letters", fails_after(2, fault_worlds.early_letters))
        with pytest.raises(ValueError, match="the endpoint is down"):
            train(cfg)
    assert "grpo: failed at step 1 of 2; saved" in capfd.readouterr().err
    train(cfg, resume=True)
    assert finished(cfg.out) == finished(whole.out)


def fails_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose n-th call fails."""
    left = iter(range(calls - 1))

    def failing(*args: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("the endpoint is down")
        return function(*args)

    return failing


@pytest.mark.parametrize("stage", ["policy", "value model"])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_pitfall_18_not_finite(
    stage: str, kind: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped without a trace in the weights, counted, forgiven after a good step; three in a row end the run."""
    cfg = config("ppo", path, tmp_path / "run", steps=4, max_tokens=1000, ptx_coef=0.0)
    step, bad, seen = Optimizer.step, {1, 2, 4, 5, 6}, []

    def poisoned(self: Optimizer, batches: Any, loss: Any, weights: Any) -> dict[str, float]:
        if self.name != stage:
            return step(self, batches, loss, weights)
        before = {n: p.detach().clone() for n, p in self.named.items()}
        seen.append(self)

        def worse(batch: Any) -> Any:
            out = loss(batch)
            if len(seen) not in bad:
                return out
            # A finite gradient under an infinite loss, or the root of zero: finite, with a slope of 0 / 0.
            odd = torch.tensor(math.inf) if kind == "loss" else (out.loss * 0).square().sqrt()
            return rk.LossOutput(out.loss + odd, out.metrics)

        try:
            return step(self, batches, worse, weights)
        finally:
            changed = any(not torch.equal(p, before[n]) for n, p in self.named.items())
            assert changed == (len(seen) not in bad)
            assert all(p.grad is None for p in self.parameters)

    monkeypatch.setattr(Optimizer, "step", poisoned)
    with pytest.raises(NotFinite, match=f"of the {stage} was not finite in 3 steps in a row"):
        train(cfg)
    assert seen[0].counters() == {"taken": 6, "skipped": 5, "skipped_in_a_row": 3}
    assert [row["skipped"] for row in lines(cfg.out / "metrics.jsonl")] == [3.0]
    about = json.loads((cfg.out / "not_finite" / "about.json").read_text())
    assert (about["model"], about["step"], about["micro_batches"]) == (stage, 6, 1)
    assert math.isfinite(float(about["losses"][0])) == (kind == "gradient")
    assert math.isfinite(float(about["grad_norm"])) == (kind == "loss")
    assert bool(about["parameters"]) == (kind == "gradient")
    batch = load_file(cfg.out / "not_finite" / "batch.safetensors")
    assert len(batch["0.packed.input_ids"]) == len(batch["0.old_logp"]) == sum(about["fields"]["0.packed.lengths"])


def test_pitfall_18_on_the_command_line(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(sft, "loss", lambda cfg, policy, batch, n: rk.LossOutput(policy.weight.sum() * math.nan, {}))
    data = ["--data", str(path / "sft.jsonl"), "--model", str(path / "base")]
    assert cli.main(["sft", *data, "--out", str(tmp_path / "run"), "--quiet"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("rlhf-train: the loss or the gradient of the policy was not finite in 3 steps in a row")
    assert said.count("\n") == 1


@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_pitfall_19_no_pickles(
    stage: str, path: Path, tmp_path: Path, stopper: Stopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for owner, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads"))):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    cfg = config(stage, path, tmp_path / "run")
    stopped_at(cfg, stopper, 2)
    assert (cfg.out / "checkpoints").exists()
    written = [p for p in cfg.out.rglob("*") if p.is_file()]
    train(cfg, resume=True)
    written += [p for p in cfg.out.rglob("*") if p.is_file()]
    assert {p.suffix for p in written} == {".safetensors", ".json", ".jsonl", ".yaml"}


def test_pitfall_19_pickles_are_refused(path: Path, tmp_path: Path, stopper: Stopper) -> None:
    cfg = config("sft", path, tmp_path / "run")
    folder = stopped_at(cfg, stopper, 2).folder / "step-0000002"
    (folder / "policy.pt").write_bytes(pickle.dumps({}))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(pickle.dumps({})).hexdigest()
    manifest["files"]["policy.pt"] = {"bytes": len(pickle.dumps({})), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"policy.pt is neither safetensors nor JSON"):
        Checkpoint(folder)

    model = tmp_path / "model"
    shutil.copytree(path / "base" / "model", model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_policy(str(model))


def test_pitfall_19_code_beside_a_model_is_not_run(path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(path / "base" / "model", model)
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "of_their_own"}
    settings["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(str(model))
    assert not (tmp_path / "ran").exists()


def test_pitfall_15_the_code_of_a_reward_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home_made.py").write_text("def letters(prompts, responses, **_): return [1.0] * len(responses)\n")
    monkeypatch.syspath_prepend(tmp_path)
    here = world(tmp_path / "here")
    cfg = dataclasses.replace(config("ppo", here, tmp_path / "out"), reward="home_made:letters")
    before = inputs(cfg)
    assert any("home_made:letters" in name for name in before)
    (tmp_path / "home_made.py").write_text("def letters(prompts, responses, **_): return [2.0] * len(responses)\n")
    assert inputs(cfg) != before
