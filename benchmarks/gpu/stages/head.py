"""The head beside its floor, bare products of the same shapes in turns with it; then other entries of the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.gpu.context import Context
from benchmarks.gpu.stages import clock
from benchmarks.gpu.stages.shapes import draw, heads, listed, named, some_far, using
from rlhf_kernels.backends.triton.products import leave_product, product
from rlhf_kernels.backends.triton.table import Blocks, Entry, Fold

SAMPLE = 256  # rows whose float64 truth is computed
SMALL_BYTES = 750_000_000


def candidates(listed: Entry) -> dict[str, Entry]:
    """What the table could say instead: of scoring, and of PPO."""
    fused, strips, found = listed.by("fused"), listed.by("strips"), {}
    for blocks in (Blocks(128, 256, 64, 8, 3), Blocks(128, 256, 64, 8, 4), Blocks(128, 128, 64, 8, 3)):
        found["score; fused, {} x {} x {}, {} warps, {} stages".format(*blocks)] = fused._replace(score=blocks)
    for blocks in (Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 4), Blocks(64, 128, 64, 4, 4)):
        found["ppo; fused, {} x {} x {}, {} warps, {} stages".format(*blocks)] = fused._replace(half=blocks)
    for width in (4096, 8192, 16384):
        found[f"score; strips of {width}"] = found[f"ppo; strips of {width}"] = strips._replace(strip=width)
    for fold in (Fold(1, 1024, 2, 4), Fold(1, 2048, 4, 8)):
        found["ppo; fold of {} row, {} columns, {} times, {} warps".format(*fold)] = strips._replace(fold=fold)
    return found


class Problem:
    """A batch, its floor, and the calls that are measured."""

    def __init__(self, ctx: Context, shape: tuple[int, int, int]) -> None:
        self.ctx, self.shape = ctx, shape
        self.hidden, self.weight, self.targets = draw(shape, ctx.place)
        self.x, self.w = (t.clone().requires_grad_() for t in (self.hidden, self.weight))
        self.full = torch.zeros(self.weight.shape, device=ctx.place)
        self.advantages = torch.randn(len(self.targets), device=ctx.place)
        self.old = self.score().logp

    def score(self, **options: Any) -> rk.TokenStats:
        options = {"targets": self.targets, "backend": self.ctx.backend, "checks": False} | options
        with torch.no_grad():
            return rk.token_stats(self.hidden, self.weight, options.pop("targets"), **options)

    def ppo(self, **options: Any) -> None:
        """The gradient of the weight goes to ``weight_grad`` if it is given, and else to the weight's own."""
        self.x.grad = self.w.grad = None
        given = {"targets": self.targets, "advantages": self.advantages, "backend": self.ctx.backend, "checks": False}
        given |= options
        rk.ppo_loss(self.x, self.w, given.pop("targets"), self.old, given.pop("advantages"), **given).loss.backward()

    def floor(self) -> dict[str, clock.Step]:
        """One and three bare products, with halves and with float32 coming out."""
        rows = min(len(self.hidden), 4096)  # as much of the logits as exists at a time
        x, weight, full = self.hidden[:rows], self.weight, self.full
        g = torch.randn(rows, len(weight), device=self.ctx.place).to(x.dtype)
        z, repeats = torch.empty_like(g), range(-(-len(self.hidden) // rows))

        def one() -> None:
            for _ in repeats:
                torch.mm(x, weight.T, out=z)

        def one_full() -> None:
            for _ in repeats:
                product(x, weight.T)

        def three() -> None:
            for _ in repeats:
                torch.mm(x, weight.T, out=z)
                torch.mm(g, weight)
                torch.mm(g.T, x)

        def three_full() -> None:
            for _ in repeats:
                product(x, weight.T)
                product(g, weight)
                leave_product(full, g.T, x, False)

        return {"1 mm": one, "1 mm, fp32 out": one_full, "3 mm": three, "3 mm, fp32 out": three_full}

    def ours(self) -> dict[str, clock.Step]:
        """Scoring and PPO, as the table has it and both ways through the head."""
        steps: dict[str, clock.Step] = {}
        sink = {"weight_grad": self.full}
        calls: dict[str, Callable[[], Any]] = {
            "score": self.score, "ppo": self.ppo, "ppo, weight_grad": partial(self.ppo, **sink),
            "ppo, entropy": partial(self.ppo, entropy_coef=0.01),
            "ppo, entropy, weight_grad": partial(self.ppo, entropy_coef=0.01, **sink),
        }  # fmt: skip
        chosen = listed(self.ctx)
        for name, call in calls.items():
            for way, entry in {"listed": chosen, "fused": chosen.by("fused"), "strips": chosen.by("strips")}.items():
                if way == "listed" or name in ("score", "ppo"):
                    steps[f"{name}; {way}"] = by(entry, call)
        return steps


def by(entry: Entry, call: Callable[[], Any]) -> clock.Step:
    """The call, with an entry of the table of its own."""

    def step() -> Any:
        with using(entry):
            return call()

    return step


def errors(stats: rk.TokenStats, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    """Against float64 on a sample of rows, and what plain torch on a product with float32 output is off by."""
    some = torch.arange(0, len(targets), max(1, len(targets) // SAMPLE), device=hidden.device)[:SAMPLE]
    z = hidden[some].double() @ weight.double().T
    logp = z.log_softmax(-1)
    at = targets[some, None]
    true, entropy = logp.gather(1, at).squeeze(1), -(logp.exp() * logp).sum(-1)
    plain = product(hidden[some], weight.T).log_softmax(-1)
    found = {
        "logp": (stats.logp[some].double() - true).abs().max(),
        "entropy": (stats.entropy[some].double() - entropy).abs().max(),
        "torch_logp": (plain.gather(1, at).squeeze(1).double() - true).abs().max(),
        "torch_entropy": (-(plain.exp() * plain).sum(-1).double() - entropy).abs().max(),
        "mean_entropy": entropy.mean(),
    }
    return {name: float(x) for name, x in found.items()}


def tried(ctx: Context, steps: dict[str, clock.Step], note: Callable[[str, clock.Step], Any]) -> dict[str, Any]:
    """What ``note`` finds in each step's first call, which compiles; steps that fail are named and left out."""
    found = {}
    for name, step in steps.items():
        if ctx.left() < 2:
            ctx.cut(name)
            continue
        with ctx.attempt(name):
            step()
            found[name] = note(name, step)
    return found


def timed(
    ctx: Context, problem: Problem, steps: dict[str, clock.Step], rounds: int, floors: tuple[str, ...] = (),
    more: dict[str, dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Steps in turns, a row each; those whose name begins with "score" are one product, others three."""
    n, h, v = problem.shape
    times = clock.in_turns(steps, 1 if ctx.dry else rounds, ctx.left)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    for name, ms in times.items():
        products = 1 if name.startswith(("1 mm", "score")) else 3
        row: dict[str, Any] = {"shape": named(problem.shape), "what": name, "ms": medians[name], "least": min(ms)}
        row |= {"most": max(ms), "rounds": len(ms), "tflops": products * 2 * n * h * v / medians[name] / 1e9}
        for output in floors:
            if f"{products} mm{output}" in medians:
                row[f"over_floor{output}"] = medians[name] / medians[f"{products} mm{output}"]
        ctx.row(**row | (more or {}).get(name, {}))


def beside_the_floor(ctx: Context, problem: Problem) -> None:
    """Times in turns with the floor, memory, launches, errors."""
    steps = problem.floor() | problem.ours()

    def note(name: str, step: clock.Step) -> dict[str, Any]:
        found: dict[str, Any] = {"extra_mb": clock.peak(step)}
        if " mm" not in name and problem.shape == heads(ctx)[0]:  # a profile takes a second
            found |= clock.counts(step)
        if name.startswith("score"):
            found["errors"] = errors(step(), problem.hidden, problem.weight, problem.targets)
        return found

    more = tried(ctx, steps, note)
    timed(ctx, problem, {name: steps[name] for name in more}, 8, ("", ", fp32 out"), more)


def special(ctx: Context, problem: Problem) -> None:
    """By the table, with our defaults: rows that nobody wants, and little memory."""
    n, place, far = len(problem.targets), ctx.place, some_far(problem.targets, problem.shape[2])
    odd = torch.arange(n, device=place) % 2 == 1
    few = problem.advantages.where(torch.rand(n, device=place) >= 0.3, 0.0)
    calls: dict[str, Callable[[], Any]] = {
        "ppo": problem.ppo,
        "ppo, half the rows ignored": partial(problem.ppo, targets=problem.targets.masked_fill(odd, -100)),
        "ppo, advantage zero in 30 %": partial(problem.ppo, advantages=few),
        "ppo, one target in a hundred at random": partial(problem.ppo, targets=far),
        "score, one target in a hundred at random": partial(problem.score, targets=far),
        "ppo, max_bytes 0.75e9": partial(problem.ppo, max_bytes=SMALL_BYTES),
        "score, max_bytes 0.75e9": partial(problem.score, max_bytes=SMALL_BYTES),
    }
    steps = {f"{name}; listed": by(listed(ctx), call) for name, call in calls.items()}
    more = tried(ctx, steps, lambda _, step: {"extra_mb": clock.peak(step)} | clock.counts(step))
    floor = {name: step for name, step in problem.floor().items() if name in ("1 mm", "3 mm")}
    timed(ctx, problem, floor | {name: steps[name] for name in more}, 5, ("",), more)


def other_entries(ctx: Context, problem: Problem) -> None:
    """Every candidate, scoring and PPO."""
    steps: dict[str, clock.Step] = {}
    found = candidates(listed(ctx))
    for name in list(found)[2::4] if ctx.dry else found:
        steps[name] = by(found[name], problem.score if name.startswith("score") else problem.ppo)
    more = tried(ctx, steps, lambda *_: {"candidate": True})
    timed(ctx, problem, {name: steps[name] for name in more}, 5, more=more)


def run(ctx: Context) -> None:
    for part in (beside_the_floor, special, other_entries):
        for shape in heads(ctx):
            if ctx.left() < 5:
                ctx.cut(part.__name__, shape=named(shape))
                continue
            with ctx.attempt(f"{part.__name__} at {named(shape)}"):
                part(ctx, Problem(ctx, shape))
