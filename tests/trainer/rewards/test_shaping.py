"""How a score is shaped, by hand and by the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.rewards.test_compare import options
from trainer.rewards.shaping import check_rewards, combined, ranged, shaped


def test_ensembles_are_combined_as_the_paper_says() -> None:
    members = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    assert combined(options(ensemble="mean"), members).tolist() == [3.0, 1.0]
    assert combined(options(ensemble="worst"), members).tolist() == [1.0, 0.0]
    found = combined(options(ensemble="penalised", ensemble_penalty=0.3), members)
    torch.testing.assert_close(found, torch.tensor([3 - 0.3 * 8 / 3, 1 - 0.3 * 2]))


SCORES, LENGTHS, CUT = (
    torch.tensor([4.0, -1.0, 2.0]),
    torch.tensor([4.0, 8.0, 10.0]),
    torch.tensor([False, False, True]),
)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({}, [4.0, -1.0, 2.0]),
        ({"reward_per_token": True}, [1.0, -0.125, 0.2]),
        ({"length_coef": -0.5}, [2.0, -5.0, -3.0]),
        ({"eos_bonus": 1.0}, [5.0, 0.0, 2.0]),
        ({"overlong_tokens": 4}, [4.0, -1.5, 1.0]),
        ({"truncation": "penalise", "truncation_score": -7.0}, [4.0, -1.0, -7.0]),
        ({"truncation": "penalise"}, [4.0, -1.0, -1.0]),
        ({"reward_per_token": True, "length_coef": 1.0, "eos_bonus": 1.0}, [6.0, 8.875, 10.2]),
    ],
)
def test_shaping_by_hand(option: dict[str, Any], wanted: list[float]) -> None:
    cfg = options(**{"truncation": "keep", "max_new_tokens": 10, **option})
    torch.testing.assert_close(shaped(cfg, SCORES, LENGTHS, CUT), torch.tensor(wanted))


def test_an_aspect_stays_in_its_range() -> None:
    assert ranged(options(reward_clip=1.5), SCORES).tolist() == [1.5, -1.0, 1.5]
    white = ranged(options(reward_normalize=True), SCORES)
    torch.testing.assert_close(white, (SCORES - SCORES.mean()) / SCORES.std(unbiased=False), rtol=1e-4, atol=1e-5)
    assert ranged(options(reward_normalize=True), torch.full((4,), 7.3)).tolist() == [0.0] * 4
    for bad, message in (
        ({"reward_clip": 0.0}, "reward_clip: got 0.0"),
        ({"overlong_tokens": 65, "max_new_tokens": 64}, "overlong_tokens: got 65, want 0 to max_new_tokens=64"),
        ({"ensemble_penalty": -1.0}, "ensemble_penalty: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_rewards(options(**bad))
