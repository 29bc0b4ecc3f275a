"""Kernels for packed sequences beside padding: torch's own, and the flash-attn that is installed, if there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from trainer.models import attention

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch's deterministic mode refuses cuBLAS
LENGTHS = [700, 1, 64, 129, 1023]
CASES = [(None, 8, None), (2, 8, 0.3), (100, 2, None), (5000, 1, 0.05)]  # window, key heads, scale


@pytest.fixture(params=["torch", "flash-attn"])
def fused(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    if request.param == "torch":
        return attention.torch_attention
    if attention.flash_attn(torch.cuda.get_device_capability()[0], 64) is None:
        pytest.skip("no flash-attn that can be imported and has kernels for this GPU is installed")
    return attention.fused_attention


def problem(key_heads: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    rows = [torch.randn(sum(LENGTHS), n, 64, generator=rng, device="cuda") for n in (8, key_heads, key_heads)]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()
    return [x.to(dtype).requires_grad_() for x in rows], cu_seqlens


def results(attend: Callable[..., Tensor], rows: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, from the same rows in another precision."""
    given = [x.detach().to(dtype).requires_grad_() for x in rows]
    out = attend(*given)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=torch.float64).view(out.shape).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "key_heads", "scale"), CASES)
def test_errs_at_most_twice_as_much_as_padding(fused, window, key_heads, scale, dtype):
    rows, cu = problem(key_heads, dtype)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.padded_attention(q, k, v, cu, scale, window)

    exact, plain = results(padded, rows, torch.float64), results(padded, rows, dtype)
    got = results(lambda q, k, v: fused(q, k, v, cu, max(LENGTHS), scale, window), rows, dtype)
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.parametrize(("window", "key_heads", "scale"), CASES)
def test_no_bit_of_a_neighbour_is_seen(fused, window, key_heads, scale):
    rows, cu = problem(key_heads, torch.bfloat16)
    with torch.no_grad():
        want = fused(*rows, cu, max(LENGTHS), scale, window)
        for start, end in pairwise(cu.tolist()):
            others = [x.clone() for x in rows]
            for x in others:
                x[:start] += 3
                x[end:] += 3
            assert torch.equal(fused(*others, cu, max(LENGTHS), scale, window)[start:end], want[start:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_gets_the_kernel_for_halves_and_padding_for_the_rest(monkeypatch, dtype):
    rows, cu = problem(2, dtype)
    query, key, value = (x.detach().transpose(0, 1)[None] for x in rows)
    called, kernel = [], attention.fused_attention

    def heard(*args):
        called.append(args[0].dtype)
        return kernel(*args)

    monkeypatch.setattr(attention, "fused_attention", heard)
    out, _ = attention.varlen_attention(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=cu, max_length_q=max(LENGTHS)
    )
    assert out.shape == (1, sum(LENGTHS), 8, 64)
    assert called == ([] if dtype == torch.float32 else [torch.bfloat16])
