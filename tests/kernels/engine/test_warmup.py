"""The call that pays for what is lazy runs the backend that training will run, and leaves nothing behind."""

from __future__ import annotations

import importlib

import pytest
import torch

import rlhf_kernels as rk

warmup = importlib.import_module("rlhf_kernels.engine.warmup")  # The package has a function of that name.


def test_the_backend_that_ran_is_named(backend: str) -> None:
    assert rk.warmup(8, 100, torch.float32, backend=backend) == backend


@pytest.mark.parametrize(("vocab_size", "run"), [(100, 100), (4096, 4096), (151936, 4096), (50257, 4095)])
def test_a_large_vocabulary_is_tried_in_small(monkeypatch, vocab_size: int, run: int) -> None:
    seen = []

    def fused_loss(hidden, weight, targets, objective, **options):
        seen.append(tuple(weight.shape))
        return real(hidden, weight, targets, objective, **options)

    real = warmup.fused_loss
    monkeypatch.setattr(warmup, "fused_loss", fused_loss)
    with torch.no_grad():  # as a caller may have it
        rk.warmup(8, vocab_size, torch.bfloat16, backend="eager")
        assert not torch.is_grad_enabled()
    assert seen == [(run, 8)]
    assert (run % 16 == 0) == (vocab_size % 16 == 0)
