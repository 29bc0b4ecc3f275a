"""Rewards: where they come from, how several make one, how they are shaped, and whom errors name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import tokenizer
from tests.support.small import small_policy, small_scalar
from trainer.data.chat import render_of
from trainer.data.encoding import encode_pairs
from trainer.data.packing import Sample, pack
from trainer.data.prompt import Prompt
from trainer.rewards.sources import reward_from
from trainer.sampling.rollout import Rollout

HERE = "tests.trainer.rewards.test_sources"
# "c", which ended, to "a b"; "a d", which did not, to "a"
ROLLOUT = Rollout([Sample([2, 3, 4, 1], 2), Sample([2, 2, 5], 1)], [False, True], [[0.0, 0.0], [0.0, 0.0]])
RECORDS: list[dict[str, Any]] = [{"prompt": "a b"}, {"prompt": "a", "extra": {"response": "e f"}}]


def fails_on_d(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    return [1 / (0 if "d" in r else 1) for r in responses]


def fails_on_two(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    if len(responses) > 1:
        raise KeyError("both")
    return [0.0]


def says_nothing(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[Any]:
    return [None if "d" in r else 1.0 for r in responses]


def score(name: str) -> Tensor:
    reward = reward_from(name, small_policy().tokenizer, max_length=64, max_tokens=1000, device=torch.device("cpu"))
    return reward(ROLLOUT, RECORDS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_on_d", r"raised ZeroDivisionError.*on sample 1 alone: prompt 'a', response 'a d'"),
        ("fails_on_two", r"raised KeyError.*on none of the 2 samples alone"),
        ("says_nothing", r"gave None to the response 'a d', want a finite number; the prompt was 'a'"),
    ],
)
def test_errors_name_the_sample(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(f"{HERE}:{name}")


def test_a_reward_model_that_overflows_names_the_sample(tmp_path: Path) -> None:
    model = small_scalar()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"gave (-?inf|nan) to the response 'c'"):
        score(str(tmp_path))


def test_scores_of_a_model_are_those_of_the_text(tmp_path: Path) -> None:
    small_scalar().save(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(score(str(tmp_path)), small_scalar().scores(pack(ROLLOUT.samples)))


USER = [{"role": "user", "content": "What is 2 + 2?"}]


def test_functions_see_what_people_wrote():
    seen: list[Any] = []
    tok, row = tokenizer("smollm2"), {"prompt": render_of(tokenizer("smollm2")).text("What is 2 + 2?"), "extra": {}}
    from trainer.rewards.sources import _from_function

    def score(prompts: Sequence[str], responses: Sequence[str], extras: Any) -> list[float]:
        seen.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(prompts)

    (ids,) = encode_pairs(tok, [row["prompt"]], ["It is 4."], 900)
    _from_function(score, "f", tok)(Rollout([ids], [False], [[0.0]]), [row])
    ((prompt, response),) = seen
    assert (prompt, response) == ("What is 2 + 2?", "It is 4.")
    assert isinstance(prompt, Prompt)
    assert prompt.messages == tuple(USER)
