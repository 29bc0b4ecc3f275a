"""What a policy still knows: held-out texts and tasks, each against a number that was found another way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.families import policy, tokenizer
from tests.support.small import LETTERS, write
from tests.trainer.data.chat.test_odd import said
from tests.trainer.rewards.test_exact_answer import MINUS
from trainer.evaluation import stage as evaluation
from trainer.evaluation.alignment_tax import answer_all, held_out_texts, losses, per_token, read_task, right
from trainer.evaluation.stage import EvalConfig, evaluate
from trainer.models.loading import load_policy

USER = {"role": "user", "content": "What is 2 + 2?"}


def test_blank_lines_of_held_out_text_are_left_out(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"text": "It is 4."}, {"text": ""}, {"text": "So it is."}])
    for name in ("pythia", "llama3"):
        assert len(held_out_texts(path, tokenizer(name), 99)) == 2


@pytest.mark.parametrize(("name", "given"), [("glm4", 2), ("llama3", 1), ("pythia", 1)])
def test_what_stands_before_a_text_is_not_asked_of_the_model(tmp_path: Path, name: str, given: int):
    (sample,) = held_out_texts(write(tmp_path / "t.jsonl", [{"text": "It is 4."}]), tokenizer(name), 99)
    assert sample.prompt_length == given


def test_policies_that_read_other_tokens_pay_no_tax(tmp_path: Path):
    """One and the same model with a template and without one; and once more with fewer positions."""
    for folder in ("chat", "plain"):
        policy("qwen2").save(tmp_path / folder)
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    path = write(tmp_path / "d.jsonl", [{"messages": [USER, said("It is 4.")]}] * 4)
    cut = tmp_path / "cut"
    policy("qwen2").save(cut)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    texts = write(tmp_path / "t.jsonl", [{"text": "It is 4, and so on. " * 9}])
    for base, lm_data, verdicts in (("plain", path, 0), ("cut", texts, 1)):
        models = {"model": str(tmp_path / "chat"), "base": str(tmp_path / base)}
        cfg = evaluation.EvalConfig(lm_data=lm_data, out=tmp_path / f"o{base}", quiet=True, **models)
        found = evaluation.evaluate(cfg)
        assert len(found["verdicts"]) == verdicts
    assert abs(found["language_model"]["policy"]["tax"].value) < 1e-6


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
    tax = evaluate(replace(world, data=None, judge=None, lm_data=path))["language_model"]
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
    found = evaluate(replace(world, data=None, judge=None, tasks=(path,)))["task copying"]
    assert found["policy"]["right"].value == pytest.approx(4 / 6)
    before = answer_all(load_policy(str(world.base)), prompts, max_new_tokens=6)
    known = sum(right(a, s) for a, s in zip(answers, before, strict=True))
    assert found["base"]["right"].value == pytest.approx(known / 6)
    assert found["policy"]["change"].value == pytest.approx((4 - known) / 6)
    with pytest.raises(ValueError, match="line 1 has no answer"):
        read_task(write(tmp_path / "none.jsonl", [{"prompt": "p"}]), policy.tokenizer)


@pytest.mark.parametrize(
    ("answer", "response", "want"),
    [
        (f"{MINUS}4", "x = -4.", True), ("4", "2-4", True), ("-4", "2-4", False), ("0.5", "It is .5", True),
        ("2e-05", "0.00002", True), ("1,500", "$1500", True), ("3/4", "0.75", True), ("25%", "25 percent", True),
        ("$-4", "-4", True), ("COVID-19", "19", False), ("COVID-19", " covid-19. ", True), ("nan", "NaN", True),
        ("5 km", "5", False),
    ],
)  # fmt: skip
def test_tasks_read_numbers_by_the_same_rules(answer: str, response: str, want: bool) -> None:
    assert right(answer, response) is want
