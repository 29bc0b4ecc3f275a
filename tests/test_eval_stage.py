"""`rlhf-train eval`: win rates, held-out loss and tasks, each against a number that was found another way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer_worlds import LETTERS, lines, small_policy, small_scalar, write
from trainer import cli
from trainer.evaluate import ratio_change
from trainer.evaluation import EvalConfig, run
from trainer.models import load_policy
from trainer.tax import answer_all, held_out_texts, losses, per_token, read_task, right

HERE = "tests.test_eval_stage"
WORLDS = "tests.trainer_worlds"


@pytest.fixture
def world(tmp_path: Path) -> EvalConfig:
    """Two policies and ten prompts; they are judged by how much they say the letter a."""
    for seed, name in enumerate(("before", "after")):
        small_policy(seed).save(tmp_path / name / "model")
    prompts = write(tmp_path / "prompts.jsonl", ({"prompt": f"{LETTERS[i]} {LETTERS[i + 5]}"} for i in range(10)))
    return EvalConfig(
        model=str(tmp_path / "after"), base=str(tmp_path / "before"), data=prompts, judge=f"{WORLDS}:share_of_a",
        out=tmp_path / "out", max_new_tokens=6, quiet=True,
    )  # fmt: skip


def first_wins(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that looks at the place and at nothing else."""
    return [1.0 for _ in prompts]


def more_of_b(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that compares."""
    return [0.5 + 0.5 * ((x > y) - (x < y)) for x, y in zip(_b(first), _b(second), strict=True)]


def unsure(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that does not keep to the scale."""
    return [2.0 for _ in prompts]


def _b(texts: Sequence[str]) -> list[int]:
    return [t.split().count("b") for t in texts]


def test_a_win_rate_is_that_of_the_samples(world: EvalConfig) -> None:
    found = run(replace(world, prompts=8))["responses"]["policy"]["win_rate"]
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
    same = run(replace(world, base=world.model, lm_data=texts))
    assert same["responses"]["policy"]["win_rate"].value == 0.5
    assert same["language_model"]["policy"]["tax"].value == 0.0
    assert [v["title"] for v in same["verdicts"]] == ["No winner", "It still knows its language"]


def test_judges_that_compare_are_asked_in_both_orders(world: EvalConfig) -> None:
    by_place = run(replace(world, judge=f"compare:{HERE}:first_wins"))
    assert by_place["responses"]["policy"]["win_rate"].value == 0.5
    assert "score" not in by_place["responses"]["policy"]
    one = run(replace(world, judge=f"compare:{HERE}:more_of_b"))["responses"]["policy"]["win_rate"].value
    assert world.base is not None
    other = run(replace(world, judge=f"compare:{HERE}:more_of_b", model=world.base, base=world.model))
    assert one != 0.5
    assert other["responses"]["policy"]["win_rate"].value == pytest.approx(1 - one)
    with pytest.raises(ValueError, match=r"gave 2\.0 for the prompt"):
        run(replace(world, judge=f"compare:{HERE}:unsure"))


def test_reward_models_judge_too(world: EvalConfig, tmp_path: Path) -> None:
    scalar = small_scalar()
    scalar.set_statistics(torch.tensor([0.0, 2.0]))
    scalar.save(tmp_path / "rm" / "model")
    found = run(replace(world, judge=str(tmp_path / "rm")))["responses"]
    assert found["policy"]["score"].value != found["base"]["score"].value
    alone = run(replace(world, judge=str(tmp_path / "rm"), base=None))["responses"]
    assert alone["policy"]["score"] == found["policy"]["score"]
    assert "win_rate" not in alone["policy"]


def test_held_out_loss_is_that_of_the_model(world: EvalConfig, tmp_path: Path) -> None:
    texts = [" ".join(LETTERS[i : i + 3 + i]) for i in range(6)]
    path = write(tmp_path / "texts.jsonl", ({"text": t} for t in texts))
    policy = load_policy(world.model)
    found = losses(policy, held_out_texts(path, policy.tokenizer, 64), max_tokens=10)
    for text, mine in zip(texts, found, strict=True):
        ids = torch.tensor([policy.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            theirs = policy.model(input_ids=ids, labels=ids, use_cache=False).loss
        assert mine.tokens == ids.shape[1] - 1
        assert mine.nats / mine.tokens == pytest.approx(float(theirs), rel=1e-4)
    tax = run(replace(world, data=None, judge=None, lm_data=path))["language_model"]
    assert tax["policy"]["nats_per_token"] == pytest.approx(per_token(found))
    change = tax["policy"]["nats_per_token"] / tax["base"]["nats_per_token"] - 1
    assert tax["policy"]["tax"].value == pytest.approx(change)
    shown = write(tmp_path / "shown.jsonl", [{"prompt": "a b", "response": "c d e"}])
    (sample,) = held_out_texts(shown, policy.tokenizer, 64)
    assert losses(policy, [sample], 64)[0].tokens == 4  # three words and the end; the prompt is given


def test_tasks_count_right_answers(world: EvalConfig, tmp_path: Path) -> None:
    policy = load_policy(world.model)
    prompts = [f"{LETTERS[i]} {LETTERS[i + 6]}" for i in range(6)]
    said = answer_all(policy, prompts, max_new_tokens=6)
    answers = [s if i < 4 else "something else" for i, s in enumerate(said)]
    path = write(
        tmp_path / "copying.jsonl", ({"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True))
    )
    found = run(replace(world, data=None, judge=None, tasks=(path,)))["task copying"]
    assert found["policy"]["right"].value == pytest.approx(4 / 6)
    before = answer_all(load_policy(str(world.base)), prompts, max_new_tokens=6)
    known = sum(right(a, s) for a, s in zip(answers, before, strict=True))
    assert found["base"]["right"].value == pytest.approx(known / 6)
    assert found["policy"]["change"].value == pytest.approx((4 - known) / 6)
    with pytest.raises(ValueError, match="line 1 has no answer"):
        read_task(write(tmp_path / "none.jsonl", [{"prompt": "p"}]), policy.tokenizer)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data": None, "judge": None}, "nothing to evaluate on"),
        ({"judge": None}, "judge: goes with data"),
        ({"judge": "compare:x:y", "base": None}, "base: a judge that compares"),
        (
            {"judge": "compare:tests.test_eval_stage:nobody"},
            "want a reward model's folder or module:function, compare:",
        ),
        ({"judge": "nowhere:nobody"}, "want a reward model's folder or module:function"),
        ({"prompts": 0}, "prompts: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_bad_options_are_explained(world: EvalConfig, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(replace(world, **options))


def test_changes_are_paired() -> None:
    grown = ratio_change([1.0, 5.0, 2.0, 8.0], [1.2, 6.0, 2.4, 9.6])
    assert grown.value == pytest.approx(0.2)
    assert grown.high - grown.low < 1e-9
    mixed = ratio_change([1.0, 1.0, 1.0, 1.0], [0.5, 1.5, 0.6, 1.4])
    assert mixed.low < 0 < mixed.high


def test_the_command_leaves_a_report(world: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model", world.model, "--base", str(world.base), "--data", str(world.data), "--judge", str(world.judge),
        "--out", str(world.out), "--max-new-tokens", "4", "--quiet",
    ]  # fmt: skip
    assert cli.main(["eval", *flags]) == 0
    page = (world.out / "report.html").read_text()
    assert "Win rate" in page
    assert "report.html" in capsys.readouterr().out
