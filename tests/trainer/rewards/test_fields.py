"""A reward that cannot be computed from the data ends the run before it begins, with the line that lacks a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.rollouts import world
from tests.support.small import write
from trainer.cli import program as cli
from trainer.evaluation import stage as evaluation
from trainer.models import loading
from trainer.rewards.fields import read_prompts, wanted
from trainer.stages.rl import stage as rl
from trainer.stages.rl.grpo import GRPOConfig
from trainer.stages.rl.stage import grpo
from trainer.training import setup

HERE = "tests.trainer.rewards.test_fields"
EXACT = [("reward", "exact_answer")]


def topical(prompts: Sequence[str], responses: Sequence[str], records: Sequence[dict[str, Any]]) -> list[float]:
    return [float(r["topic"] in text) for r, text in zip(records, responses, strict=True)]


def odd(prompts: Sequence[str], responses: Sequence[str], records: Sequence[dict[str, Any]]) -> list[float]:
    return [0.0 for _ in prompts]


topical.fields = ("topic",)  # type: ignore[attr-defined]
odd.fields = "topic"  # type: ignore[attr-defined]


def prompts(path: Path, *extras: dict[str, Any], blank: bool = False) -> Path:
    file = write(path / "some.jsonl", ({"prompt": f"p{i}", **extra} for i, extra in enumerate(extras)))
    if blank:
        file.write_text("\n\n" + file.read_text())
    return file


@pytest.mark.parametrize(
    ("extras", "line", "has"),
    [
        ([{"solution": "1", "level": 2}], 3, "level, solution"),
        ([{"answer": 1}, {"answer": "2"}, {}], 5, "a prompt and nothing else"),
        ([{"answer": "1"}, {"answer": None, "topic": "t"}], 4, "topic"),
    ],
)
def test_the_first_record_without_the_field_is_named(tmp_path: Path, extras: list, line: int, has: str) -> None:
    """Counted in lines of the file, blank ones included; null is no answer."""
    path = prompts(tmp_path, *extras, blank=True)
    message = f"^reward: exact_answer wants the field answer in every record, and .*some.jsonl line {line} has none"
    with pytest.raises(ValueError, match=message) as refused:
        read_prompts(path, EXACT)
    assert str(refused.value).endswith(f"(it has {has})")


def test_answers_without_a_number_are_counted_unless_none_has_one(tmp_path: Path) -> None:
    notes: list[str] = []
    answers = ["#### 4", "Paris", 7, True, 1e-5]
    records = read_prompts(prompts(tmp_path, *({"answer": a} for a in answers)), EXACT, note=notes.append)
    assert [r["extra"]["answer"] for r in records] == answers
    assert len(notes) == 1
    assert "2 of 5 records have answers without a number" in notes[0]
    assert notes[0].endswith("lines 2, 4")
    path = prompts(tmp_path, {"answer": "Paris"}, {"answer": [3]})
    with pytest.raises(ValueError, match=r"^gold_reward: exact_answer wants a number .* line 1 has 'Paris'"):
        read_prompts(path, [("gold_reward", "exact_answer")])


def test_only_what_is_used_has_to_be_whole(tmp_path: Path) -> None:
    path = prompts(tmp_path, {"answer": 1}, {})
    assert len(read_prompts(path, EXACT, most=1)) == 1
    assert len(read_prompts(path, [("reward", "http://localhost:1/score"), ("judge", f"compare:{HERE}:odd")])) == 2


def test_functions_of_ones_own_say_what_they_want(tmp_path: Path) -> None:
    path = prompts(tmp_path, {"topic": "a"}, {"subject": "b"})
    with pytest.raises(ValueError, match=rf"^judge: {HERE}:topical wants the field topic .* line 2 .*has subject"):
        read_prompts(path, [("judge", f"{HERE}:topical")])
    assert len(read_prompts(path, [("judge", f"{HERE}:topical")], load=False)) == 2
    with pytest.raises(ValueError, match=rf"^judge: {HERE}:odd has fields = 'topic', want the names of fields"):
        read_prompts(path, [("judge", f"{HERE}:odd")])
    assert wanted("tests.support.small:share_of_a", "reward") == ()


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded: that would be work."""

    def load(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    for module in (setup, loading, evaluation):
        monkeypatch.setattr(module, "load_policy", load)
    monkeypatch.setattr(rl, "policy_for", load)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "named",
    [
        {"reward": "exact_answer"},
        {"reward": ("a=tests.support.small:share_of_a", "b=exact_answer@0.5")},
        {"gold_reward": "exact_answer"},
    ],
    ids=["alone", "beside another", "gold"],
)
def test_a_run_without_answers_does_not_begin(tmp_path: Path, named: dict[str, Any]) -> None:
    option = next(iter(named))
    with pytest.raises(ValueError, match=f"^{option}: exact_answer wants the field answer"):
        grpo(GRPOConfig(**world(tmp_path) | named))


@pytest.mark.usefixtures("idle")
def test_an_evaluation_without_answers_does_not_begin(tmp_path: Path) -> None:
    options = world(tmp_path)
    model, path = str(tmp_path / "model"), options["data"]
    cfg = evaluation.EvalConfig(model=model, data=path, judge="exact_answer", out=tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match=r"^judge: exact_answer wants the field answer"):
        evaluation.evaluate(cfg)
    whole = prompts(tmp_path, {"answer": 1}, {})
    with pytest.raises(AssertionError, match="a model is loaded"):
        evaluation.evaluate(replace(cfg, data=whole, prompts=1))


@pytest.mark.parametrize("name", ["exact_answer", f"{HERE}:topical"])
def test_a_recipe_is_refused_where_its_data_is_there(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before its first stage; a function is asked where its module is imported anyway, which --check does not do."""
    recipe, path = tmp_path / "recipe.yaml", prompts(tmp_path, {"solution": "1"}, {"solution": "2"})
    recipe.write_text(
        f"stages:\n  sft: {{data: {path}, steps: 1}}\n  grpo: {{model: '${{sft}}', data: {path}, reward: {name}}}\n"
    )
    argv = ["pipeline", str(recipe), "--allow-code", HERE, "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--check"]) == (2 if name == "exact_answer" else 0)
    capfd.readouterr()
    assert cli.main(argv) == 2
    said = capfd.readouterr().err
    assert f"grpo: reward: {name} wants the field" in said
    assert not (tmp_path / "out" / "sft" / "model").exists()
