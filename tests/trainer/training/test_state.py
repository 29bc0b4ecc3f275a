"""What changes while a run runs, taken apart and put together again."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from trainer.training.progress import Progress
from trainer.training.state import Mark, Restored


@dataclass
class Inner:
    """A dataclass within the state."""

    coef: float
    rows: torch.Tensor


@dataclass
class State(Progress):
    """One field of each kind that stages have, but for an optimizer."""

    model: nn.Linear
    source: torch.Generator
    inner: Inner | None = None
    order: list[int] = field(default_factory=list)
    infinite: float = 0.0


def state(seed: int) -> State:
    torch.manual_seed(seed)
    random.seed(seed)
    return State(nn.Linear(2, 2), torch.Generator().manual_seed(seed))


def test_a_state_comes_back_as_it_was_at_its_mark() -> None:
    then = state(1)
    then.inner, then.order, then.step, then.infinite = Inner(0.5, torch.arange(3.0)), [3, 1], 7, float("inf")
    mark = Mark(then)
    wanted = then.model.weight.detach().clone()
    drawn = [torch.rand(2).tolist(), torch.rand(2, generator=then.source).tolist(), random.random()]
    then.order.append(9)  # What is small is copied by the mark; it goes on changing.
    plain, tensors = json.loads(json.dumps(mark.plain())), mark.tensors()
    now = state(2)
    assert not now.model.weight.equal(wanted)
    Restored(plain, lambda name: tensors[name], torch.device("cpu")).into(now)
    assert now.model.weight.equal(wanted)
    assert (now.step, now.order, now.infinite) == (7, [3, 1], float("inf"))
    assert now.inner is not None
    assert (now.inner.coef, now.inner.rows.tolist()) == (0.5, [0.0, 1.0, 2.0])
    assert [torch.rand(2).tolist(), torch.rand(2, generator=now.source).tolist(), random.random()] == drawn


def test_what_nobody_knows_how_to_save_is_refused_at_the_mark() -> None:
    odd: Any = state(1)
    odd.order = [object()]
    with pytest.raises(TypeError, match="order: a object has no state_dict and cannot be saved"):
        Mark(odd)


def test_a_state_of_other_fields_is_refused() -> None:
    mark = Mark(state(1))
    plain, tensors = mark.plain(), mark.tensors()
    del plain["order"]
    with pytest.raises(ValueError, match=r"the state of another version, \['order'\] differ"):
        Restored(plain, lambda name: tensors[name], torch.device("cpu")).into(state(2))
