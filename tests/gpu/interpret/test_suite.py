"""What the GPU suite runs, run once where there is none."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk
from benchmarks import gpu_small
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import table


def test_every_kernel_runs_as_the_sanitizer_sees_it(monkeypatch, capsys):
    monkeypatch.setattr(backend, "entry", backend.entry)  # which it changes
    gpu_small.main()
    assert "every kernel ran" in capsys.readouterr().out


def test_a_target_that_is_no_column_poisons_its_own_row_alone():
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    targets = torch.tensor([3, 40, 7, 0, 39])
    stats = rk.token_stats(hidden, weight, targets, backend="triton", checks=False)
    assert stats.logp.isnan().tolist() == [False, True, False, False, False]
    assert stats.entropy.isnan().tolist() == [False, True, False, False, False]


def test_a_row_of_nan_stays_alone():
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    hidden[2] = torch.nan
    stats = rk.token_stats(hidden, weight, torch.arange(5), backend="triton", checks=False)
    assert stats.logp.isnan().tolist() == [False, False, True, False, False]


def test_float64_is_refused_by_name():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'triton' computes in float32"):
        rk.token_stats(x, torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), backend="triton")


def test_an_unlisted_chip_gets_the_conservative_entry_and_one_notice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=r"compute capability 7\.5"):
        assert table.entry(torch.device("cuda")) is table.CONSERVATIVE
    assert table.entry(torch.device("cuda")) is table.CONSERVATIVE  # and no second warning, which would be an error
