"""What is wrong with a recipe is told before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")

from tests.support.pipelines import ALLOWED, STAGES, environment, written  # noqa: F401 (a fixture)
from trainer.cli import program as cli

BAD: list[tuple[str, dict[str, Any] | None, str]] = [
    ("sft", {"stage": "sfd"}, "unknown stage 'sfd'; did you mean 'sft'?"),
    ("sft", {"stage": "demo"}, "unknown stage 'demo'; want one of dpo"),
    ("group", {"num_generation": 3}, "group: unknown option 'num_generation'; did you mean 'num_generations'?"),
    ("ppo", {"model": "${stf}"}, "ppo: model: ${stf} is neither a variable nor an earlier stage; did you mean ${sft}?"),
    ("reward", {"model": "${ppo}"}, "reward: model: ${ppo} is no earlier stage"),
    ("group", {"model": "${after}"}, "group: model: ${after} is no earlier stage"),
    ("reward", {"model": "${split}"}, "reward: model: split leaves no model"),
    ("sft", {"data": "${split}"}, "sft: data: ${split} is a folder, want a file in it"),
    ("sft", {"data": "${split}/test.jsonl"}, "sft: data: got test.jsonl, want train.jsonl or held_out.jsonl of split"),
    ("group", {"data": "${world}/prompt.jsonl"}, "prompts.jsonl?; the variables are world="),
    ("ppo", {"ptx_data": "${world}/none.jsonl", "ptx_coef": 0.1}, "none.jsonl does not exist"),
    ("sft", {"model": "./nowhere"}, "sft: model: ./nowhere is not the folder of a model"),
    ("sft", {"lr": 0}, "sft: lr: got 0.0, want a positive number"),
    ("sft", {"lr": "inf"}, "sft: lr: got inf, want a positive number"),
    ("sft", {"max_grad_norm": 0}, "sft: max_grad_norm: got 0.0, want a positive number"),
    ("group", {"num_generations": 1}, "group: num_generations: got 1, want at least 2"),
    ("group", {"reward": "tests.support.runs:late_letters"}, "reward: got 'tests.support.runs:late_letters', want"),
    ("group", {"reward": "${sft}"}, "group: reward: sft leaves no reward model"),
    ("after", {"judge": "${sft}"}, "sft leaves no reward model"),
    ("after", {"judge": None}, "after: judge: goes with data"),
    ("split", {"held_out": 1.0}, "split: held_out: got 1.0, want a share between 0 and 1"),
    ("sft", {"out": "elsewhere"}, "sft: out and threads are those of the whole pipeline"),
    ("sft", {"steps": {"a": 1}}, "sft: steps must be a plain value"),
    ("../sft", {}, "../sft: want a name of letters"),
    ("world", {"stage": "sft"}, "'world' is a variable and a stage"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_recipes_cost_one_line_and_no_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "world").symlink_to(place / "world")
    path = written(tmp_path, STAGES | {name: STAGES.get(name, {}) | changes})
    assert cli.main(["pipeline", str(path), "--out", str(tmp_path / "run"), *ALLOWED]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
