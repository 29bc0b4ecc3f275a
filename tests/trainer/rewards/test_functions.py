"""Rewards from functions of one's own: found, imported, and held to numbers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.small import small_policy
from trainer.data.packing import Sample
from trainer.rewards import sources as rewards
from trainer.rewards.sources import reward_from
from trainer.sampling.rollout import Rollout

HERE = "tests.support.small"


def reward(name: str) -> Any:
    return reward_from(name, small_policy().tokenizer, max_length=64, max_tokens=1000, device=torch.device("cpu"))


ROLLOUT = Rollout([Sample([2, 3, 4, 1], 2), Sample([2, 2, 5], 1)], [False, True], [[0.0, 0.0], [0.0, 0.0]])


RECORDS: list[dict[str, Any]] = [{"prompt": "a b"}, {"prompt": "a", "extra": {"answer": "7"}}]


def test_rewards_from_functions() -> None:
    assert reward(f"{HERE}:share_of_a")(ROLLOUT, RECORDS).tolist() == [0.0, 0.5]
    assert reward("exact_answer")(ROLLOUT, RECORDS).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="short_reward gave 1 scores for 2 responses"):
        reward(f"{HERE}:short_reward")(ROLLOUT, RECORDS)
    with pytest.raises(ValueError, match="gave nan to the response 'c', want a finite number"):
        reward(f"{HERE}:broken_reward")(ROLLOUT, RECORDS)
    for name in ("nowhere:at_all", "no_such_function", f"{HERE}:nothing"):
        with pytest.raises(ValueError, match=r"reward: got .* want a reward model's folder or module:function"):
            reward(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nltkk\ndef f(*_): ...", r"ModuleNotFoundError: No module named 'nltkk' \(line 1\)"),
        ("def f(*_): ...\ndef g(:", r"SyntaxError: invalid syntax \(of_mine_1.py, line 2\)"),
        ("def f(*_): ...\n1 / 0", r"ZeroDivisionError: division by zero \(line 2\)"),
    ],
)
def test_a_module_that_is_there_and_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """Its own fault is told: it is no reward that does not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    name = f"of_mine_{'def g(' in text:d}"
    (tmp_path / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=rf"^reward: got '{name}:f', which is in .*{name}\.py, but .*fails: {said}$"):
        reward(f"{name}:f")


@pytest.mark.parametrize("score", ["1_000", "1", b"1", 1e39, -1e39, 10**400, float("nan"), None, [1.0], "x" * 10_000])
def test_scores_of_functions_are_numbers_that_float32_has(monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    """Python may say true and false, though, and give numbers of numpy or torch."""
    monkeypatch.setattr(rewards, "responses_of", lambda *_: ["r"] * 5)
    given: list[Any] = [True, 2, np.float32(0.5), torch.tensor(0.25), score]
    reward = rewards._from_function(lambda *_: given, "my:f", None)
    with pytest.raises(
        ValueError, match=r"my:f gave .{1,60} to the response 'r', want a finite number; the prompt was"
    ):
        reward(None, [{"prompt": "p"}] * 5)  # type: ignore[arg-type]
    given[4] = 3.0e38
    assert reward(None, [{"prompt": "p"}] * 5).tolist() == [1.0, 2.0, 0.5, 0.25, pytest.approx(3e38)]  # type: ignore[arg-type]
