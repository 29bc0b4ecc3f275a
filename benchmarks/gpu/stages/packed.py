"""Advantages, rewards and attention over packed sequences, against definitions in float64.

Those of advantages are the library's torch expression, which the tests hold to the oracle: the oracle itself adds up
every sum of the definition, for hours at a length that fills a program.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.contenders.base import Skipped
from benchmarks.gpu.context import Context
from benchmarks.gpu.stages import extension
from benchmarks.gpu.stages.gae import EPS, GAMMA, LAM, Batch, in_torch
from rlhf_kernels import reference

ULPS = 8  # An error may have so many of the largest result's, where plain torch in float32 has fewer.


def lengths_of(ctx: Context) -> list[int]:
    return [5, 0, 1, 30, 0, 64] if ctx.dry else [5, 0, 1, 30, 0, 700, 2333, 0, 1024, 1]


def judge(
    ctx: Context, what: str, call: Callable[[], tuple[Tensor, Tensor]], truth: Callable[[torch.dtype], Any]
) -> None:
    """A row with errors beside those of plain torch in float32; ``truth`` in float32 may be what it is in float64."""
    got, again, exact, plain = call(), call(), truth(torch.float64), truth(torch.float32)
    errors, fine = [], True
    for x, want, theirs in zip(got, exact, plain, strict=True):
        error = (x.cpu().double() - want).abs().max().item()
        limit = (theirs.double() - want).abs().max().item()
        errors.append([error, limit])
        fine &= error <= max(2 * limit, ULPS * torch.finfo(torch.float32).eps * want.abs().max().item())
    same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    ctx.row(what=what, ok=fine, same_bits=same, errors=errors)


def expression(given: Batch, whiten: bool, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Advantages and returns by plain torch in a dtype."""
    return in_torch(Batch(*(x.to(kind) if x.is_floating_point() else x for x in given)), whiten)


def advantages(ctx: Context, name: str = "triton") -> None:
    """By "triton" or by "cuda", with a mask, a value after the end, and whitening."""
    lengths = lengths_of(ctx)
    rng = torch.Generator().manual_seed(0)
    n = sum(lengths)
    rewards, values = torch.randn(2, n, generator=rng)
    mask = torch.rand(n, generator=rng) >= 0.3
    ends, bootstrap = torch.tensor([0, *lengths]).cumsum(0), torch.randn(len(lengths), generator=rng)
    given = Batch(rewards.where(mask, 0.0), values + 3, ends, mask, bootstrap)
    here = [x.to(ctx.place) for x in given]
    if name == "cuda":
        if ctx.dry:
            raise Skipped("a dry run has no GPU for the CUDA extension")
        extension.wait(min(ctx.left(), 10.0))
    module: Any = importlib.import_module(f"rlhf_kernels.backends.{name}_gae")
    for eps in (None, EPS):

        def call(eps: float | None = eps) -> tuple[Tensor, Tensor]:
            return module.gae(*here, GAMMA, LAM) if eps is None else module.whitened_gae(*here, GAMMA, LAM, eps)

        def truth(kind: torch.dtype, eps: float | None = eps) -> tuple[Tensor, Tensor]:
            return expression(given, eps is not None, kind)

        judge(ctx, f"advantages by {name}{', whitened' if eps else ''}", call, truth)


def rewards(ctx: Context) -> None:
    """Shaped rewards, each estimate of KL."""
    lengths = lengths_of(ctx)
    rng = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logp, ref_logp = -4 * torch.rand(2, n, generator=rng)
    mask, cu_seqlens = torch.rand(n, generator=rng) >= 0.4, torch.tensor([0, *lengths]).cumsum(0)
    given = torch.randn(len(lengths), generator=rng), logp, ref_logp, cu_seqlens
    here, mask_here = [x.to(ctx.place) for x in given], mask.to(ctx.place)
    module: Any = importlib.import_module("rlhf_kernels.backends.triton_rewards")
    for kl in ("k1", "k2", "k3"):

        def call(kl: str = kl) -> tuple[Tensor, Tensor]:
            return module.shaped_rewards(*here, mask_here, 0.3, kl, 1.0)

        def truth(_: torch.dtype, kl: str = kl) -> tuple[Tensor, Tensor]:
            return reference.shaped_rewards(*given, beta=0.3, mask=mask, kl=kl, kl_clip=1.0)

        with ctx.attempt(f"shaped rewards, {kl}"):
            judge(ctx, f"shaped rewards, {kl}", call, truth)


def whole(ctx: Context) -> None:
    """The front door's advantages and rewards, which choose among these themselves."""
    lengths = lengths_of(ctx)
    rng = torch.Generator().manual_seed(1)
    n = sum(lengths)
    rewards, values = torch.randn(2, n, generator=rng)
    every, ends = torch.ones(n, dtype=torch.bool), torch.tensor([0, *lengths]).cumsum(0)
    given = Batch(rewards, values, ends, every, torch.zeros(len(lengths)))
    here = [x.to(ctx.place) for x in given[:3]]
    judge(
        ctx, "advantages by the front door",
        lambda: rk.gae(*here, gamma=GAMMA, lam=LAM, whiten=True),
        lambda kind: expression(given, True, kind),
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, scale: float | None) -> Tensor:
    """Causal attention, one sequence after the other."""
    out, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        repeat = q.shape[1] // k.shape[1]
        a, b, c = q[rows], k[rows].repeat_interleave(repeat, 1), v[rows].repeat_interleave(repeat, 1)
        scores = torch.einsum("ihd,jhd->hij", a, b) * (scale if scale is not None else q.shape[2] ** -0.5)
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        seen = (distance >= 0) & (distance < (n if window is None else window))
        weights = scores.masked_fill(~seen, -torch.inf).to(torch.promote_types(q.dtype, torch.float32)).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights.to(q.dtype), c))
        start += n
    return torch.cat(out)


def attention_ways(ctx: Context) -> dict[str, Callable[..., Tensor] | str]:
    """Name -> function of rows, boundaries, the longest, scale and window; or why it is not here."""
    from trainer.models import attention

    flash = attention.flash_attn(torch.cuda.get_device_capability()[0], 64)
    none = "a dry run has no GPU" if ctx.dry else "none is installed that has kernels for this chip"

    def padded(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _: int, scale: float | None, window: int | None) -> Tensor:
        return attention.padded_attention(q, k, v, cu, scale, window)

    return {
        "flash-attn": none if flash is None or ctx.dry else attention.fused_attention,
        "torch's kernel": none if ctx.dry else attention.torch_attention,
        "padding": padded,
    }


def gradients(function: Callable[..., Tensor], rows: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Output and gradients of the same rows in a dtype."""
    leaves = [x.to(kind).clone().requires_grad_() for x in rows]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(kind))]


def attention_by(
    ctx: Context, way: Callable[..., Tensor], what: str, rows: list[Tensor], lengths: list[int], window: int | None,
    scale: float | None,
) -> None:  # fmt: skip
    """A row for one way: output and gradients against float64, beside plain torch in the same dtype."""
    dtype = rows[0].dtype
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device=ctx.place, dtype=torch.int32)

    def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, lengths, window, scale)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return way(q, k, v, cu, max(lengths), scale, window)

    exact, plain = gradients(plainly, rows, torch.float64), gradients(plainly, rows, dtype)
    got, again = (gradients(packed, rows, dtype) for _ in range(2))
    errors = [
        [((x.double() - true).norm() / true.norm()).item() for x in (mine, theirs)]
        for mine, theirs, true in zip(got, plain, exact, strict=True)
    ]
    same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    fine = all(error <= max(2 * limit, torch.finfo(dtype).eps) for error, limit in errors)
    ctx.row(what=what, ok=fine, same_bits=same, errors=errors)


def attention(ctx: Context) -> None:
    """The trainer's packed attention, by each way that is there."""
    lengths = [5, 1, 17] if ctx.dry else [300, 1, 64, 129, 523]
    rng = torch.Generator(ctx.place).manual_seed(0)
    ways, half = attention_ways(ctx), torch.bfloat16
    cases = ((None, 8, None), half), ((2, 2, 0.3), half), ((100, 2, None), torch.float16)
    for (window, key_heads, scale), dtype in cases:
        rows = [torch.randn(sum(lengths), n, 64, generator=rng, device=ctx.place) for n in (8, key_heads, key_heads)]
        for name, way in ways.items():
            what = f"attention by {name}, window {window}, {key_heads} key heads, {str(dtype)[6:]}"
            with ctx.attempt(what):
                if isinstance(way, str):
                    raise Skipped(way)
                attention_by(ctx, way, what, [x.to(dtype) for x in rows], lengths, window, scale)


def run(ctx: Context) -> None:
    for part in (advantages, rewards, whole, attention):
        with ctx.attempt(part.__name__):
            part(ctx)
