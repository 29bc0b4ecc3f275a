"""Attention over packed sequences: no neighbour is seen, and whichever flash-attn is installed is called rightly.

flash-attn needs a GPU. Functions with its signatures stand in for it here, and do what it says to do in float64.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from tests.support.small import LETTERS, ragged, small_policy
from trainer.data.packing import Sample, pack
from trainer.models import attention

LENGTHS = [7, 1, 12, 2, 9]
CASES = [(None, 4, None), (1, 4, 0.3), (5, 2, None), (5, 4, 0.3), (100, 1, 2.0)]  # window, key heads, scale
THIRD, FOURTH, SECOND = (name for name, _, _ in attention.FLASH)


def problem(key_heads: int = 4, dtype: torch.dtype = torch.float64, width: int = 8) -> tuple[list[Tensor], Tensor]:
    """Query, key and value of four heads of 8, the values of ``width``, and the boundaries."""
    rng = torch.Generator().manual_seed(0)
    sizes = ((4, 8), (key_heads, 8), (key_heads, width))
    rows = [torch.randn(sum(LENGTHS), *size, generator=rng, dtype=dtype) for size in sizes]
    return [x.requires_grad_() for x in rows], torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def plainly(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float | None, left: int | None, right: int | None
) -> Tensor:
    """Sequence by sequence: a query at i sees keys from i - left to i + right; None is no limit."""
    assert cu.dtype == torch.int32
    repeat, parts = q.shape[1] // k.shape[1], []
    for start, end in pairwise(cu.tolist()):
        a, b, c = (
            x[start:end].transpose(0, 1) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
        )
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance <= left if left is not None else seen
        seen &= -distance <= right if right is not None else seen
        scores = a @ b.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(parts)


def endless(limit: int) -> int | None:
    return None if limit < 0 else limit


# The names of the arguments and their defaults are those of flash-attn 2.8.3, of its third version at the end of 2025,
# and of flash-attn-4 4.0.0b36; of the last the arguments for other uses are left out.


def second(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert dropout_p == softcap == 0
    assert cu_seqlens_k is cu_seqlens_q
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    left, right = map(endless, window_size)
    return plainly(q, k, v, cu_seqlens_q, softmax_scale, left, 0 if causal else right)


def third(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    left, right = map(endless, window_size)
    return plainly(q, k, v, cu_seqlens_q, softmax_scale, left, 0 if causal else right)


def fourth(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    assert cu_seqlens_k is cu_seqlens_q
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    left, right = window_size  # -1 is a limit here, beside a right that is none
    return plainly(q, k, v, cu_seqlens_q, softmax_scale, left, 0 if causal else right), torch.zeros(4, len(q))


STANDS_IN = {SECOND: second, THIRD: third, FOURTH: fourth}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """``installed(chip, {module: function})``: those and no others, on a chip of that compute capability."""

    def install(chip: int, modules: dict[str, Callable[..., Any] | None]) -> list[tuple[str, dict[str, Any]]]:
        calls: list[tuple[str, dict[str, Any]]] = []
        for name, _, _ in attention.FLASH:
            found = modules.get(name)
            module = ModuleType(name) if name in modules else None  # None: importing it fails
            if module is not None and found is not None:
                module.flash_attn_varlen_func = _heard(found, name, calls)  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (chip, 0))
        attention.flash_attn.cache_clear()
        return calls

    yield install
    attention.flash_attn.cache_clear()


def _heard(function: Callable[..., Any], name: str, calls: list) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append((name, inspect.signature(function).bind(*args, **kwargs).arguments))
        return function(*args, **kwargs)

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def results(attend: Callable[..., Tensor], rows: list[Tensor]) -> list[Tensor]:
    """The output, and gradients of something that treats all of it differently."""
    out = attend(*rows)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), rows)]


@pytest.mark.parametrize(("window", "key_heads", "scale"), CASES)
@pytest.mark.parametrize("name", STANDS_IN)
def test_every_flash_attn_is_asked_for_the_same(installed, name, window, key_heads, scale):
    (rows, cu), calls = problem(key_heads), installed(9, {name: STANDS_IN[name]})
    got = results(lambda q, k, v: attention.fused_attention(q, k, v, cu, max(LENGTHS), scale, window), rows)
    want = results(lambda q, k, v: attention.padded_attention(q, k, v, cu, scale, window), rows)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert [called for called, _ in calls] == [name]


@pytest.mark.parametrize(("window", "key_heads", "scale"), CASES)
def test_torchs_own_kernel_is_asked_for_the_same(installed, monkeypatch, window, key_heads, scale):
    (rows, cu), calls, real = problem(key_heads), installed(9, {}), inspect.signature(varlen.varlen_attn)

    def stands_in(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(("torch", given := real.bind(*args, **kwargs).arguments))
        assert given["query"].shape == given["key"].shape, "torch 2.11 has no grouped keys"
        assert given["max_q"] == given["max_k"] == max(LENGTHS)
        left, right = given["window_size"]
        return plainly(*args[:4], given.get("scale"), endless(left), endless(right))

    monkeypatch.setattr(varlen, "varlen_attn", stands_in)
    got = results(lambda q, k, v: attention.fused_attention(q, k, v, cu, max(LENGTHS), scale, window), rows)
    want = results(lambda q, k, v: attention.padded_attention(q, k, v, cu, scale, window), rows)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert [called for called, _ in calls] == ["torch"]


@pytest.mark.parametrize(
    ("there", "chip", "size", "chosen"),
    [
        ((SECOND, THIRD, FOURTH), 9, 64, THIRD),
        ((SECOND, FOURTH), 9, 64, FOURTH),
        ((SECOND, THIRD, FOURTH), 10, 128, FOURTH),
        ((SECOND, THIRD, FOURTH), 10, 256, SECOND),  # wider than the fourth has
        ((SECOND, THIRD, FOURTH), 12, 64, SECOND),
        ((SECOND, THIRD, FOURTH), 8, 64, SECOND),
        ((THIRD,), 10, 64, None),  # made for Hopper only
        ((), 9, 64, None),
    ],
)
def test_the_first_that_knows_the_chip_is_taken(installed, there, chip, size, chosen):
    installed(chip, {name: STANDS_IN[name] for name in there})
    found = attention.flash_attn(chip, size)
    wanted = chosen and inspect.signature(STANDS_IN[chosen])
    assert (found and inspect.signature(found)) == wanted


def test_what_cannot_be_called_is_passed_over(installed):
    def early_beta(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
        raise AssertionError("no windows")

    calls = installed(9, {THIRD: None, FOURTH: early_beta, SECOND: second})  # the third has no such function
    (q, k, v), cu = problem()
    attention.fused_attention(q, k, v, cu, max(LENGTHS), None, None)
    assert [name for name, _ in calls] == [SECOND]


@pytest.mark.parametrize("wanted", [True, False])
def test_torchs_switch_asks_for_the_same_bits_twice(installed, wanted):
    (q, k, v), cu = problem()
    calls = installed(9, {SECOND: second})
    torch.use_deterministic_algorithms(wanted)
    attention.fused_attention(q, k, v, cu, max(LENGTHS), None, None)
    assert calls[0][1]["deterministic"] is wanted


@pytest.mark.parametrize("name", STANDS_IN)
def test_who_stands_in_takes_what_the_real_one_takes(name):
    real = pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError).flash_attn_varlen_func
    assert inspect.signature(real).parameters.keys() >= inspect.signature(STANDS_IN[name]).parameters.keys()
    assert importlib.import_module(name).flash_attn_varlen_func is real


def densely(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float | None, window: int | None) -> Tensor:
    """All rows against all, most of them masked."""
    place, own = torch.arange(len(q)), torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff())
    before = place[:, None] - place
    seen = (own[:, None] == own) & (before >= 0) & (before < (len(q) if window is None else window))
    group = q.unflatten(1, (k.shape[1], -1))  # [N, key heads, queries of each, D]
    scores = torch.einsum("ikgd,jkd->kgij", group, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    return torch.einsum("kgij,jke->ikge", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1, 2)


@pytest.mark.parametrize("width", [1, 5, 8, 13])
@pytest.mark.parametrize(("window", "key_heads", "scale"), CASES)
def test_values_have_a_width_of_their_own(window, key_heads, scale, width):
    """As in multi-head latent attention; the output has it too."""
    rows, cu = problem(key_heads, width=width)
    got = results(lambda q, k, v: attention.padded_attention(q, k, v, cu, scale, window), rows)
    want = results(lambda q, k, v: densely(q, k, v, cu, scale, window), rows)
    assert got[0].shape == (sum(LENGTHS), 4, width)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_transformers_gets_that_width_packed_and_sampling():
    (q, k, v), cu = problem(width=5)
    given = [x.transpose(0, 1)[None] for x in (q, k, v)]
    packed, _ = attention.varlen_attention(torch.nn.Module(), *given, None, cu_seq_lens_q=cu, max_length_q=max(LENGTHS))
    torch.testing.assert_close(packed[0], densely(q, k, v, cu, None, None), rtol=1e-12, atol=1e-12)
    start, end = int(cu[2]), int(cu[3])
    alone, _ = attention.varlen_attention(torch.nn.Module(), *(x[:, :, start:end] for x in given), None)
    torch.testing.assert_close(alone, packed[:, start:end], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "fused"), [(64, True), (32, False), (128, False)])
def test_the_fused_kernels_get_equal_widths_only(monkeypatch, width, fused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    query, value = (
        SimpleNamespace(is_cuda=True, device=None, dtype=torch.bfloat16, shape=(1, 4, 30, size)) for size in (64, width)
    )
    assert attention._fusible(query, value) is fused  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize(("window", "key_heads", "scale"), CASES)
def test_no_bit_of_a_neighbour_is_seen(window, key_heads, scale, width, dtype):
    """Neighbours of nothing but NaN change neither output nor gradients of a sequence."""
    rows, cu = problem(key_heads, dtype, width)
    for start, end in pairwise(cu.tolist()):
        own = slice(start, end)
        poisoned = [torch.full_like(x, torch.nan) for x in rows]
        for x, clean in zip(poisoned, rows, strict=True):
            x[own] = clean[own].detach()
            x.requires_grad_()
        (out, *grads), (alone, *wanted) = (
            [y := attention.padded_attention(*given, cu, scale, window)[own], *torch.autograd.grad(y.sum(), given)]
            for given in (poisoned, rows)
        )
        assert torch.equal(out, alone)
        assert all(torch.equal(a[own], b[own]) for a, b in zip(grads, wanted, strict=True))


def test_other_tokens_beside_it_change_no_bit_of_a_sequence():
    """Through a whole model, and the head."""
    policy, samples = small_policy(), ragged(7)

    def other(sample: Sample) -> Sample:
        return Sample([(token + 5) % len(LETTERS) for token in sample.tokens], sample.prompt_length)

    with torch.no_grad():
        packed = pack(samples)
        hidden, logp = policy.hidden(packed), policy.stats(packed).logp
        for i, (start, end) in enumerate(pairwise(packed.cu_seqlens.tolist())):
            beside = pack([s if j == i else other(s) for j, s in enumerate(samples)])
            assert torch.equal(policy.hidden(beside)[start:end], hidden[start:end])
            assert torch.equal(policy.stats(beside).logp[start:end], logp[start:end])


def test_under_autocast_the_fused_kernels_get_its_precision(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(attention, "_fusible", lambda *given: seen.extend(given))
    with torch.autocast("cpu", torch.bfloat16):
        small_policy().hidden(pack([Sample([1, 2, 3], 1)]))
    assert {x.dtype for x in seen} == {torch.bfloat16}
