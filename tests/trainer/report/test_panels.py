"""Which plots there are, and what shares one."""

from __future__ import annotations

import json
import re

from trainer.report import page as report
from trainer.run.log import RunLog


def test_the_nearest_metric_wins_and_the_rest_is_kept(tmp_path):
    lines = [{"stage": "ppo", "step": i, "objective/entropy": 9.0, "policy/entropy_avg": 0.5} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.write(tmp_path).read_text(encoding="utf-8")
    training, _, others = page.partition("Every other metric")
    assert "step 1: 0.5<" in training
    assert "step 1: 9<" not in training
    assert "step 1: 9<" in others


def test_arms_share_a_plot_and_strangers_do_not(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    for stage, metrics in (
        ("sft", {"entropy": 3.0, "nll": 2.0}),
        ("ppo", {"entropy": 1.0, "kl": 0.1, "ratio": 1.0}),
        ("hack", {"entropy": 0.5, "kl": 9.0, "ratio": 1.0}),
    ):
        with log.start(stage, 1) as bar:
            bar.step(metrics)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    legends = re.findall(r"<b>Entropy</b><span class=legend>(.*?)</span><small>", page)
    assert [re.findall(r">(\w+)<", legend + "<") for legend in legends] == [["sft"], ["ppo", "hack"]]
