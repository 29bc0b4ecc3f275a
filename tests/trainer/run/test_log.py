"""The log that a run leaves behind, and what it shows meanwhile."""

from __future__ import annotations

import json
import os

import pytest
import torch

from trainer.base import console
from trainer.run.log import RunLog, records


def test_metrics_and_samples_reach_the_disk_at_once(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    with log.start("sft", 2) as bar:
        bar.step({"loss": torch.tensor(0.5), "odd": float("nan")})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
            "stage": "sft", "step": 1, "loss": 0.5, "odd": None,
        }  # fmt: skip
        bar.step({"loss": 0.25})
    log.samples("before and after", [{"prompt": "p", "before": "a", "after": "ü"}])
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["title"] == "before and after"


def test_the_summary_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    log = RunLog(tmp_path, quiet=True)
    log.summary({"n": 1, "x": torch.tensor(2.0), "bad": float("inf"), "path": tmp_path})
    expected = {"n": 1, "x": 2.0, "bad": None, "path": str(tmp_path)}
    assert json.loads((tmp_path / "summary.json").read_text()) == expected

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        log.summary({"n": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == expected


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path, capsys):
    """Lines of later steps go, those of other stages stay, and so does half of nothing."""
    log = RunLog(tmp_path, quiet=True)
    for stage, steps in (("sft", 2), ("ppo", 3)):
        with log.start(stage, steps) as bar:
            for _ in range(steps):
                bar.step({"loss": 1.0})
    (tmp_path / "alarms.jsonl").write_text('{"stage": "ppo", "step": 2}\n{"stage": "ppo", "step": 3}\n')
    log.samples("first", [{"prompt": "p"}])
    size = log.samples_bytes()
    log.samples("second", [{"prompt": "p"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "st')
    log.cut("ppo", 2, size)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [("sft", 1), ("sft", 2), ("ppo", 1), ("ppo", 2)]
    assert (tmp_path / "alarms.jsonl").read_text() == '{"stage": "ppo", "step": 2}\n'
    assert json.loads((tmp_path / "samples.jsonl").read_text())["title"] == "first"
    with log.start("ppo", 3, done=2) as bar:
        bar.step({"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert capsys.readouterr().err == ""
    log.cut("ppo", 4, None)
    assert "should hold steps 1 to 4 of ppo" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_said_once(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    def run():
        with log.start("sft", 2) as bar:
            bar.step({"loss": 1.0})

    with pytest.raises(OSError, match="step 1 could not be logged: No space left on device"):
        run()


def test_plain_progress_knows_what_lies_behind(tmp_path, capsys, monkeypatch):
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with RunLog(tmp_path).start("sft", 10, done=7) as bar:
        for _ in range(3):
            bar.step({"loss": 0.5})
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("(10 s, 20 s left)")
    assert last.startswith("sft  10/10")


def test_plain_progress_is_brief(tmp_path, capsys):
    log = RunLog(tmp_path)
    with log.start("sft", 100) as bar:
        for _ in range(100):
            bar.step({"loss": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("sft  100/100  loss 0.5")
    log.table("Results", [("loss", "0.5"), ("accuracy", "0.9 ± 0.1")])
    log.samples("Some", [{"prompt": "p"}] * 9)
    log.note("done")
    shown = capsys.readouterr().out
    assert "  loss      0.5\n  accuracy  0.9 ± 0.1\n" in shown
    assert shown.count("prompt  p") == 4
    assert shown.endswith("done\n")


def test_quiet_is_silent(tmp_path, capsys):
    log = RunLog(tmp_path, quiet=True)
    with log.start("sft", 1) as bar:
        bar.step({"loss": 1.0})
    log.table("t", [("a", "b")])
    log.samples("s", [{"prompt": "p"}])
    log.note("n")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_terminal_gets_one_bar_and_brackets_survive(tmp_path, monkeypatch, capsys):
    rich_console = pytest.importorskip("rich.console")
    terminal = rich_console.Console(force_terminal=True, width=100)
    monkeypatch.setattr(console, "_rich_console", lambda: terminal)
    log = RunLog(tmp_path)
    with log.start("ppo [weak]", 2) as bar:
        bar.step({"loss": 1.0})
        bar.step({"loss": 0.5})
    log.table("Results [x]", [("win rate", "0.8 [b]")])
    shown = capsys.readouterr().out
    assert "ppo [weak]" in shown
    assert "2/2" in shown
    assert "Results [x]" in shown
    assert "0.8 [b]" in shown


def test_what_is_read_back_is_what_we_would_have_written(tmp_path):
    """Whoever else wrote it: numbers that JSON or a float has not are null, so that a pipeline can gather them."""
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"a": NaN, "b": [-Infinity, 1e999], "c": {"9" * 400}, "d": -{"9" * 5000}, "e": 12, "f": -0.5, "g": true}}\n'
    )
    (found,) = records(tmp_path / "metrics.jsonl")
    assert found == {"a": None, "b": [None, None], "c": None, "d": None, "e": 12, "f": -0.5, "g": True}
    assert isinstance(found["e"], int)
    assert records(tmp_path / "none.jsonl") == []
