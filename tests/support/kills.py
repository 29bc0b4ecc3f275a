"""Kills short runs of every stage with SIGKILL at random moments, resumes them, and compares bits.

``python -m tests.support.kills --kills 50`` prints one line per kill, and ends with status 1 at the first difference.
Every safe point is saved, so that many kills fall into a save. Runs are forks of this process, which itself computes
nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.runs import RL, STAGES, config, finished, train, world
from trainer.run.checkpoint import Checkpoints
from trainer.training import session
from trainer.training.options import StageConfig


def child(work: Callable[[], object]) -> int:
    """Does the work in a fork; returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def succeeded(process: int) -> bool:
    """Waits for the process."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def killed(process: int, after: float) -> bool:
    """Kills the process after some seconds; false if it was done by then."""
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def short(stage: str, path: Path, out: Path) -> StageConfig:
    """A run in which steps take longer than getting ready for them."""
    return config(stage, path, out, **({} if stage in RL else {"steps": 12}))


def undisturbed(stage: str, path: Path) -> tuple[dict[str, Any], float]:
    """What the stage leaves behind, and how many seconds it takes when it saves all the time."""
    began, cfg = time.monotonic(), short(stage, path, path / f"whole-{stage}")
    if not succeeded(child(lambda: train(cfg))):
        raise SystemExit(f"{stage} fails without being killed")
    return finished(cfg.out), time.monotonic() - began


def main(kills: int, seed: int, stages: list[str]) -> int:
    """Runs the kills in turn over the stages; 0 if every run came back bit by bit."""
    torch.set_num_threads(1)
    session.SECONDS = 0.0
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        succeeded(child(lambda: world(path)))
        wanted = {stage: undisturbed(stage, path) for stage in stages}
        in_a_save = 0
        for number in range(kills):
            stage = stages[number % len(stages)]
            cfg = short(stage, path, path / f"run-{number}")
            hits = 0
            while hits == 0 or (source.random() < 0.3 and not (cfg.out / "summary.json").exists()):
                process = child(lambda cfg=cfg: train(cfg, resume=True))
                hit = killed(process, source.uniform(0.0, wanted[stage][1]))
                hits += hit
                in_a_save += hit and any((cfg.out / "checkpoints").glob("*.saving"))
                if not hit:  # too late: it has to be killed in another life
                    cfg = short(stage, path, path / f"run-{number}-{source.random()}")
            saved = (Checkpoints(cfg.out).names() or ["the beginning"])[-1]
            if not succeeded(child(lambda cfg=cfg: train(cfg, resume=True))):
                print(f"{number + 1}: {stage} could not be resumed from {saved}", flush=True)
                return 1
            if finished(cfg.out) != wanted[stage][0]:
                print(f"{number + 1}: {stage} came back otherwise, resumed from {saved}", flush=True)
                return 1
            print(f"{number + 1}: {stage} killed {hits} times, resumed from {saved}: the same bits", flush=True)
        print(f"{kills} runs, {in_a_save} kills within a save, all the same bits")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    sys.exit(main(**vars(parser.parse_args())))
