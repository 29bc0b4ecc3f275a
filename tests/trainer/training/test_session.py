"""A run goes on where it stopped, and says what it cannot know of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import STAGES, Stopper, config, finished, one_step_at_a_time, same_mark, train
from tests.support.small import write
from trainer.cli import program as cli
from trainer.run.stops import Terminated
from trainer.stages.sft import SFTConfig
from trainer.training.session import Session


def test_a_run_that_an_earlier_version_began_is_told(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "response": "r"}])
    session = Session(SFTConfig(data=path, out=tmp_path / "o", quiet=True), None, "sft")
    with pytest.raises(ValueError, match="was begun by an earlier version, which read prompts and replies"):
        session._compare({"config": {}, "inputs": {}})


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
