"""`rlhf-train eval`: win rates, held-out loss and tasks, each against a number that was found another way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.cli import program as cli
from trainer.evaluation.stage import EvalConfig, evaluate


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data": None, "judge": None}, "nothing to evaluate on"),
        ({"judge": None}, "judge: goes with data"),
        ({"judge": "compare:x:y", "base": None}, "base: a judge that compares"),
        (
            {"judge": "compare:tests.trainer.evaluation.test_stage:nobody"},
            "want a reward model's folder or module:function, compare:",
        ),
        ({"judge": "nowhere:nobody"}, "want a reward model's folder or module:function"),
        ({"prompts": 0}, "prompts: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_bad_options_are_explained(world: EvalConfig, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate(replace(world, **options))


def test_the_command_leaves_a_report(world: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model", world.model, "--base", str(world.base), "--data", str(world.data), "--judge", str(world.judge),
        "--out", str(world.out), "--max-new-tokens", "4", "--quiet",
    ]  # fmt: skip
    assert cli.main(["eval", *flags]) == 0
    page = (world.out / "report.html").read_text()
    assert "Win rate" in page
    assert "report.html" in capsys.readouterr().out
