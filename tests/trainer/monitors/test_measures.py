"""Signals of a rollout by hand."""

from __future__ import annotations

import math
import re

import pytest

from trainer.monitors.measures import Samples, distinct_n, of_samples, regression


def test_signals_of_samples_by_hand():
    samples = Samples(
        prompts=["sort b a", "sort d c", "sort b a"],
        responses=["sure a b", "sure c d", "no"],
        lengths=[4, 4, 2],
        scores=[1.0, 2.0, 0.0],
        gold=[0.0, 0.0, 3.0],
    )
    found = of_samples(samples, [re.compile("(?i)SURE")])
    assert found["proxy"] == 1.0
    assert found["proxy_se"] == pytest.approx(1 / math.sqrt(3))
    assert found["gold"] == 1.0
    assert found["gold_std"] == pytest.approx(math.sqrt(3))
    assert found["length"] == pytest.approx(10 / 3)
    assert found["length_slope"] == pytest.approx(0.75)
    assert found["length_corr"] == pytest.approx(0.75 * math.sqrt(8 / 3) / math.sqrt(2))
    assert found["distinct"] == 1.0
    # Two responses say "sure" and what was asked, one says "no".
    assert found["forms"] == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert found["distinct_2"] == 1.0
    assert found["self_praise"] == pytest.approx(2 / 3)
    assert found["self_praise_gain"] == pytest.approx(1.5)
    assert regression([3.0, 3.0], [1.0, 2.0]) == (0.0, 0.0)
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert "distinct_2" not in of_samples(Samples(["p"], [""], [1], [0.5]))
    with pytest.raises(ValueError, match="want one of each per response"):
        of_samples(Samples(["p"], ["a", "b"], [1, 1], [0.0, 0.0]))
