"""What a GPU finds out after a call has returned is said by name in a later one."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import checks


class Event:
    """Of a GPU that is through, or is not."""

    def __init__(self, there: bool):
        self.there = there

    def query(self) -> bool:
        return self.there


@pytest.fixture(autouse=True)
def _nothing_awaited(monkeypatch):
    monkeypatch.setattr(checks, "_awaited", deque())


def await_answer(fine: bool, message: str, there: bool = True) -> Event:
    event = Event(there)
    checks._awaited.append(checks.Answer(event, torch.tensor([True, fine]), ("what is fine", message)))
    return event


def score():
    return rk.token_stats(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64))


def test_the_next_call_says_what_was_wrong_once():
    await_answer(True, "hidden: fine")
    await_answer(False, "targets: an id is outside the vocabulary")
    await_answer(False, "weight: which is NaN for the same reason")
    with pytest.raises(ValueError, match=r"targets: an id is outside the vocabulary \(in an earlier call"):
        score()
    score()


def test_nobody_waits_for_an_answer():
    event = await_answer(False, "hidden: got NaN", there=False)
    score()
    event.there = True
    with pytest.raises(ValueError, match="hidden"):
        score()


def test_answers_come_in_order():
    await_answer(True, "first", there=False)
    await_answer(False, "second")
    score()
    assert [x.messages[1] for x in checks._awaited] == ["first", "second"]


def test_metrics_say_it_too():
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    out = rk.sft_loss(x, w, torch.tensor([1, 2]))
    await_answer(False, "targets: an id is outside the vocabulary")
    with pytest.raises(ValueError, match="targets"):
        out.metrics["entropy"]


def test_late_answers_are_read_once_by_any_thread(monkeypatch):
    """Answers of a GPU wait in one place, where two threads may look at the same time."""
    fine, event = torch.ones(1, dtype=torch.bool), type("Event", (), {"query": lambda self: True})()
    answers = deque(checks.Answer(event, fine, ("",)) for _ in range(4000))
    monkeypatch.setattr(checks, "_awaited", answers)
    failed: list[Exception] = []

    def read() -> None:
        try:
            checks.report()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not answers
