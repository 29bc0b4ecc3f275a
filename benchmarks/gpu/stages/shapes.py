"""The batches that the stages measure, and how a stage chooses the entry of the table that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton.table import Entry, entry

LARGE, SMALL = (8192, 4096, 151936), (8192, 896, 151936)  # rows, hidden, vocabulary: Qwen3-8B and Qwen2.5-0.5B
TINY = ((4, 64, 150),)  # its lines are the same


def heads(ctx: Context) -> tuple[tuple[int, int, int], ...]:
    """The large one first."""
    return TINY if ctx.dry else (LARGE, SMALL)


def named(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))


def draw(shape: tuple[int, int, int], place: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden states and weight, and targets that the policy would sample.

    Logits have a standard deviation of 2.5, and one of each row stands out by 15 to 35: the mean entropy is near one.
    """
    n, h, v = shape
    rng = torch.Generator(place).manual_seed(seed)
    weight = torch.randn(v, h, generator=rng, device=place).mul_(h**-0.5)
    tops = torch.randint(v, (n,), generator=rng, device=place)
    lift = 15 + 20 * torch.rand(n, 1, generator=rng, device=place)
    hidden = 2.5 * torch.randn(n, h, generator=rng, device=place) + lift * weight[tops]
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    parts = [(x @ weight.T).float().softmax(-1).multinomial(1, generator=rng) for x in hidden.split(1024)]
    return hidden, weight, torch.cat(parts).squeeze(1)


def some_far(targets: Tensor, vocab: int, share: float = 0.01) -> Tensor:
    """Targets of which a share is any token at all, mostly one that the policy would never sample."""
    rng = torch.Generator(targets.device).manual_seed(1)
    other = torch.randint(vocab, targets.shape, generator=rng, device=targets.device)
    return targets.where(torch.rand(targets.shape, generator=rng, device=targets.device) >= share, other)


def listed(ctx: Context) -> Entry:
    """What the table has for this chip."""
    return entry(torch.device(ctx.device))


@contextlib.contextmanager
def using(chosen: Entry) -> Iterator[None]:
    """In the block the backend runs by this entry."""
    before, backend.entry = backend.entry, lambda device: chosen
    try:
        yield
    finally:
        backend.entry = before
