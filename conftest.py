"""Doctests find ``torch`` and ``rk`` already imported, and the same random numbers every time."""

from __future__ import annotations

import pytest
import torch

import rlhf_kernels as rk


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, rk=rk)
