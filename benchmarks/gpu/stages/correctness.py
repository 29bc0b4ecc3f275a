"""Every kernel against the oracle on ragged shapes, both ways through the head, and whether two calls give equal bits.

A gradient may err twice as much as plain torch in the same dtype, a statistic twice as much as plain torch on float32
logits, each by ``FLOOR`` if that is more. Compiling a kernel takes about half a second on a GPU: cases share shapes and
options, and come in the order of their value. The oracle works on the CPU, where everybody has tested it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.gpu.context import Context
from benchmarks.gpu.stages import packed
from benchmarks.gpu.stages.shapes import listed, using
from rlhf_kernels import reference

FLOOR = 4e-6  # absolute for logp and entropy; relative to the norm for gradients
HALVES = (torch.bfloat16, torch.float16)
Results = dict[str, Tensor]
Case = Callable[[], None]


class Batch:
    """Ragged in every direction; some rows are ignored, some find their target 40 nats below the most probable."""

    def __init__(self, ctx: Context, dtype: torch.dtype, size: int | None = None) -> None:
        n, self.size, v = (6, size or 24, 150) if ctx.dry else (203, size or 136, 10_007)
        self.ctx, self.dtype = ctx, dtype
        rng = torch.Generator(ctx.place).manual_seed(0)

        def new(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*shape, generator=rng, device=ctx.place)).to(dtype)

        self.hidden, self.weight = new(n, self.size), new(v, self.size, std=2 / self.size**0.5)
        self.ref_hidden, self.ref_weight = new(n, 64), new(v, 64, std=0.25)
        self.bias = new(v, std=0.5)
        self.targets = torch.randint(v, (n,), generator=rng, device=ctx.place)
        self.temperature = 0.7 + torch.rand(n, generator=rng, device=ctx.place)
        self.advantages = torch.randn(n, generator=rng, device=ctx.place)
        far = torch.arange(1, n, 8, device=ctx.place)
        away = self.weight[self.targets[far]].float()
        self.hidden[far] = (-40 * away / (away * away).sum(1, keepdim=True) + self.hidden[far].float()).to(dtype)
        self.targets[::7] = -100
        exact = reference.token_stats(*self.on_cpu(self.hidden, self.weight, self.targets)).logp.float().to(ctx.place)
        self.old = exact + 0.1 * torch.randn(n, generator=rng, device=ctx.place)

    @staticmethod
    def on_cpu(*given: Tensor) -> list[Tensor]:
        return [x.cpu() for x in given]

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight that want gradients."""
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def oracles(self, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the oracle, in a dtype, and the targets."""
        x, w, targets = self.on_cpu(self.hidden, self.weight, self.targets)
        return x.to(kind, copy=True).requires_grad_(), w.to(kind, copy=True).requires_grad_(), targets


def weighted(parts: dict[str, Tensor]) -> Tensor:
    """A scalar in which every statistic of every row has a weight of its own."""
    return sum(
        ((x * torch.linspace(0.5, 1.5, x.numel(), device=x.device, dtype=x.dtype)).sum() for x in parts.values()),
        torch.zeros((), device=next(iter(parts.values())).device),
    )


def with_gradients(parts: dict[str, Tensor], loss: Tensor, *leaves: Tensor) -> Results:
    grads = torch.autograd.grad(loss, leaves)
    return {k: x.detach() for k, x in parts.items()} | {f"d {'xw'[i]}": g for i, g in enumerate(grads)}


def error_of(name: str, got: Tensor, exact: Tensor) -> float:
    """The largest absolute error of a statistic, the relative one in norm of a gradient."""
    off = got.cpu().double() - exact.double()
    if not name.startswith("d "):
        return off.abs().max().item()
    return (off.norm() / exact.double().norm().clamp(min=1e-30)).item()


def judge(ctx: Context, what: dict[str, Any], ours: Callable[[], Results], theirs: Callable[[torch.dtype], Results],
          dtype: torch.dtype, slack: float = 0.0) -> None:  # fmt: skip
    """A row that has every error beside that of plain torch."""
    exact, plain, wide, got, again = theirs(torch.float64), theirs(dtype), theirs(torch.float32), ours(), ours()
    errors, bad = {}, []
    for name, x in got.items():
        error = error_of(name, x, exact[name])
        limit = error_of(name, (plain if name.startswith("d ") else wide)[name], exact[name])
        errors[name] = [error, limit]
        scale = 1.0 if name.startswith("d ") else exact[name].abs().max().clamp(min=1.0).item()
        floor = max(FLOOR, 4 * torch.finfo(torch.float32).eps * scale)
        if not error <= max(2 * limit, floor) + slack:  # This is true of NaN, too.
            bad.append(name)
    same = all(torch.equal(got[name], again[name]) for name in got)
    ctx.row(**what, dtype=str(dtype)[6:], ok=not bad, bad=bad, same_bits=same, errors=errors)


def statistics_case(b: Batch, what: dict[str, Any], has_bias: bool = False, **options: Any) -> None:
    """All statistics, and gradients through all of them."""
    head: dict[str, Any] = options | {"bias": b.bias if has_bias else None}

    def ours() -> Results:
        x, w = b.leaves()
        stats = rk.token_stats(x, w, b.targets, backend=b.ctx.backend, **head)
        parts = {k: getattr(stats, k) for k in ("logp", "entropy", "lse", "mean_logit")}
        return with_gradients(parts, weighted(parts), x, w) | {"top1": stats.top1}  # type: ignore[dict-item]

    def theirs(kind: torch.dtype) -> Results:
        x, w, targets = b.oracles(kind)
        given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in head.items()}
        stats = reference.token_stats(x, w, targets, dtype=kind, **given)
        parts = {k: getattr(stats, k) for k in ("logp", "entropy", "lse", "mean_logit")}
        return with_gradients(parts, weighted(parts), x, w) | {"top1": stats.top1.detach()}

    judge(b.ctx, what, ours, theirs, b.dtype)


def scoring_case(b: Batch, what: dict[str, Any]) -> None:
    """Statistics that nobody wants gradients of."""

    def ours() -> Results:
        with torch.no_grad():
            stats = rk.token_stats(b.hidden, b.weight, b.targets, backend=b.ctx.backend)
        return {k: getattr(stats, k) for k in ("logp", "entropy", "lse")}

    def theirs(kind: torch.dtype) -> Results:
        with torch.no_grad():
            return reference.token_stats(*b.oracles(kind), dtype=kind)._asdict()

    judge(b.ctx, what, ours, theirs, b.dtype)


def ppo_case(b: Batch, what: dict[str, Any], entropy_coef: float = 0.0, zeros: bool = False, **options: Any) -> None:
    """Loss and gradients; with ``zeros`` half the rows have no gradient, and leave the products."""
    slack = 0.05 if "tolerance" in options else 0.0  # a tolerance leaves entries out, on purpose
    advantages = b.advantages.where(torch.arange(len(b.advantages), device=b.ctx.place) % 4 < 2, 0.0)
    advantages = advantages if zeros else b.advantages

    def ours() -> Results:
        x, w = b.leaves()
        given = {"backend": b.ctx.backend, "entropy_coef": entropy_coef} | options
        loss = rk.ppo_loss(x, w, b.targets, b.old, advantages, **given).loss
        return with_gradients({"loss": loss}, loss, x, w)

    def theirs(kind: torch.dtype) -> Results:
        x, w, targets = b.oracles(kind)
        given = b.on_cpu(b.old, advantages)
        loss = reference.ppo_loss(x, w, targets, *given, entropy_coef=entropy_coef, dtype=kind)
        return with_gradients({"loss": loss}, loss, x, w)

    judge(b.ctx, what, ours, theirs, b.dtype, slack)


def kl_case(b: Batch, what: dict[str, Any], direction: str) -> None:
    def ours() -> Results:
        x, w = b.leaves()
        kl = rk.kl_divergence(x, w, b.ref_hidden, b.ref_weight, b.targets, direction=direction, backend=b.ctx.backend)
        return with_gradients({"kl": kl}, weighted({"kl": kl}), x, w)

    def theirs(kind: torch.dtype) -> Results:
        x, w, targets = b.oracles(kind)
        ref = b.on_cpu(b.ref_hidden, b.ref_weight)
        kl = reference.kl_divergence(x, w, *ref, targets, direction=direction, dtype=kind)
        return with_gradients({"kl": kl}, weighted({"kl": kl}), x, w)

    judge(b.ctx, what, ours, theirs, b.dtype)


def logits_case(b: Batch, what: dict[str, Any]) -> None:
    """From logits that are there already."""
    ready = (b.hidden.float() @ b.weight.float().T).to(b.dtype)

    def ours() -> Results:
        z = ready.clone().requires_grad_()
        stats = rk.token_stats_from_logits(z, b.targets, backend=b.ctx.backend)
        parts = {k: getattr(stats, k) for k in ("logp", "entropy", "lse")}
        return with_gradients(parts, weighted(parts), z)

    def theirs(kind: torch.dtype) -> Results:
        z, targets = ready.cpu().to(kind, copy=True).requires_grad_(), b.targets.cpu()
        wide = z.to(torch.promote_types(kind, torch.float32))
        kept, log_p = targets >= 0, wide.log_softmax(1)
        own = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        found = {"logp": own, "entropy": -(log_p.exp() * log_p).sum(1), "lse": wide.logsumexp(1)}
        parts = {name: x.where(kept, 0.0) for name, x in found.items()}
        return with_gradients(parts, weighted(parts), z)

    judge(b.ctx, what, ours, theirs, b.dtype)


def cases(ctx: Context) -> Iterator[tuple[str, Case]]:
    """(its name, what to run); what is worth most comes first."""
    batches = {dtype: Batch(ctx, dtype) for dtype in (*HALVES, torch.float32)}
    entries = {way: listed(ctx).by(way) for way in ("fused", "strips")}

    def case(function: Callable[..., None], dtype: torch.dtype, way: str, name: str, batch: Batch | None = None,
             **options: Any) -> tuple[str, Case]:  # fmt: skip
        def call() -> None:
            with using(entries[way]):
                function(batch or batches[dtype], {"what": name, "way": way}, **options)

        return f"{name}; {way}; {str(dtype)[6:]}", call

    half, full = torch.bfloat16, torch.float32
    dtypes = (half, full) if ctx.dry else (half, full, torch.float16)
    for dtype in dtypes:
        for way in entries:
            yield case(scoring_case, dtype, way, "scoring")
            yield case(ppo_case, dtype, way, "ppo")
            yield case(ppo_case, dtype, way, "ppo, entropy", entropy_coef=0.1)
            yield case(statistics_case, dtype, way, "statistics")
    for dtype in dtypes:
        yield case(logits_case, dtype, "strips", "from logits")
    every = {"has_bias": True, "softcap": 20.0, "temperature": batches[half].temperature}
    for way in entries:
        yield case(statistics_case, half, way, "bias, softcap, temperature", **every)
        yield case(kl_case, half, way, "kl, reverse", direction="reverse")
    yield case(ppo_case, half, "strips", "ppo, rows without gradient", zeros=True)
    yield case(ppo_case, half, "strips", "ppo, little memory", max_bytes=10**6)
    yield case(ppo_case, half, "strips", "ppo, tolerance", tolerance=1e-3)
    for way in entries:
        yield case(ppo_case, half, way, "ppo, 37 hidden", batch=Batch(ctx, half, 37))
    yield case(kl_case, full, "fused", "kl, forward", direction="forward")
    yield case(statistics_case, full, "strips", "bias, softcap, temperature", **every)
    yield case(ppo_case, full, "fused", "ppo, tolerance", tolerance=1e-3)
    yield case(kl_case, full, "strips", "kl, reverse", direction="reverse")
    yield case(statistics_case, half, "fused", "softcap", softcap=20.0)
    yield case(statistics_case, half, "strips", "a temperature", temperature=0.7)


def run(ctx: Context) -> None:
    packed.run(ctx)  # quick, and of other kernels
    for name, call in cases(ctx):
        if ctx.left() < 3:
            ctx.cut(name)
            continue
        with ctx.attempt(name):
            call()
    with ctx.attempt("advantages by cuda"):
        packed.advantages(ctx, "cuda")  # last: it may have to wait for its compiler
