"""What goes wrong when a run is told to stop, when numbers go bad, when files hold code; each after its number."""

from __future__ import annotations

import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.runs import config, finished, train
from trainer.run.stops import Interrupted, Terminated, stop_signals


@pytest.fixture(scope="module")
def undisturbed(path: Path) -> dict[str, Any]:
    train(cfg := config("ppo", path, path / "undisturbed"))
    return finished(cfg.out)


WHERE = {
    "generation": "trainer.sampling.rollout._continue",
    "reward": "tests.support.runs.early_letters",
    "scoring": "trainer.models.policy.ScalarModel.values",
    "policy update": "rlhf_kernels.ppo_loss",
    "value update": "rlhf_kernels.value_loss",
    "Adam": "torch.optim.AdamW.step",
    "evaluation": "trainer.stages.rl.watch.Watch.evaluate",
    "logging": "trainer.run.log.Bar.step",
    "the end": "trainer.models.policy.ScalarModel.save",
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
        "import os, signal, time; from trainer.run.stops import stop_signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with stop_signals.handled():\n"
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
        with stop_signals.handled(), stop_signals.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            stop_signals.check()
    except Interrupted:  # which would end the tests, not this one
        pytest.fail("nohup is not respected")
    finally:
        signal.signal(signal.SIGINT, before)


def test_pitfall_17_a_reward_that_fails_loses_nothing(path: Path, tmp_path: Path, capfd: Any) -> None:
    whole, cfg = config("grpo", path, tmp_path / "whole"), config("grpo", path, tmp_path / "run")
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "early_letters", fails_after(2, runs.early_letters))
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
