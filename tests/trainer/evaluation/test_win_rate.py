"""Win rates are those of the samples, and nobody beats himself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.small import LETTERS, lines
from trainer.evaluation.stage import EvalConfig, evaluate


def test_a_win_rate_is_that_of_the_samples(world: EvalConfig) -> None:
    found = evaluate(replace(world, prompts=8))["responses"]["policy"]["win_rate"]
    shown = lines(world.out / "samples.jsonl")
    assert len(shown) == 8
    wins = [s["policy_score"] - s["base_score"] for s in shown]
    count = sum(0.5 if w == 0 else float(w > 0) for w in wins)
    assert found.value == count / 8
    assert found.low <= found.value <= found.high
    for sample in shown:
        said = sample["policy"].split()
        assert sample["policy_score"] == pytest.approx(said.count("a") / max(len(said), 1), abs=1e-6)
    summary = json.loads((world.out / "summary.json").read_text())
    assert summary["responses"]["policy"]["win_rate"]["value"] == found.value


def test_a_policy_against_itself_is_a_draw(world: EvalConfig) -> None:
    (texts := world.out.parent / "texts.jsonl").write_text(json.dumps({"text": " ".join(LETTERS[:9])}) + "\n")
    same = evaluate(replace(world, base=world.model, lm_data=texts))
    assert same["responses"]["policy"]["win_rate"].value == 0.5
    assert same["language_model"]["policy"]["tax"].value == 0.0
    assert [v["title"] for v in same["verdicts"]] == ["No winner", "It still knows its language"]
