"""The trainer's PPO update on a replayed rollout, by the library's loss and by losses that hold the logits.

The models are those of Qwen2.5 by their shapes, with random weights: what an update costs does not depend on what they
know. Weights and optimizer are float32 and products bfloat16, as `rlhf-train ppo --precision bfloat16` has them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.gpu.stages import clock

if TYPE_CHECKING:
    from benchmarks.gpu.context import Context
    from benchmarks.work.update import Size, World
    from trainer.models.policy import Policy

ROUNDS = 5
LEAST_SECONDS = 12.0  # making a model and one round of its updates
SPARE = 4.0  # seconds for what comes after the rounds
CLOSE = 0.05  # of gradients, relatively: products round to bfloat16
OURS = ("value", "ours")
PADDED = "none, padded attention"


class Shape(NamedTuple):
    """Of a Qwen2 with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocab: int = 151936


SHAPES = {
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864),
}
TINY = {"tiny": Shape(64, 2, 4, 2, 128, vocab=512), "tiny, narrower": Shape(32, 1, 2, 1, 64, vocab=512)}


class Step:
    """Half an update that can run out of memory without taking the others with it."""

    def __init__(self, world: World, call: Callable[[], None]) -> None:
        self.world, self.call, self.lost = world, call, ""

    def __call__(self) -> None:
        if self.lost:
            return
        try:
            self.call()
        except torch.OutOfMemoryError as error:
            self.lost = f"OutOfMemoryError: {str(error).splitlines()[0][:200]}"
        if self.lost:  # only here the error, and with it what its frames hold, is gone
            for optimizer in self.world.optimizers:
                optimizer.adam.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()


def run(ctx: Context) -> None:
    """Rows of each model while there is time: the larger first, then the one that leaves room for everybody."""
    for name, shape in (TINY if ctx.dry else SHAPES).items():
        if ctx.left() < LEAST_SECONDS:
            ctx.cut(name)
            continue
        with ctx.attempt(f"update, {name}"), ExitStack() as padding:
            _model(ctx, name, shape, padding)
        gc.collect()
        torch.cuda.empty_cache()


def _model(ctx: Context, name: str, shape: Shape, padding: ExitStack) -> None:
    from benchmarks.work.update import LOSSES, World

    policy, size = _policy(ctx, shape), _size(shape, ctx.dry)
    about: dict[str, Any] = {"model": name, "tokens": size.tokens, "micro_batch": size.tokens // 2}
    about["attention"] = attention_way(ctx, policy, padding)
    world = World(size, policy, max_tokens=size.tokens // 2, precision="bfloat16")
    ctx.say(f"{name} is made, its attention is {about['attention']}; {ctx.left():.0f} s are left")
    calls = {"value": world.value_step} | {loss: _policy_call(world, loss) for loss in LOSSES}
    steps = {what: Step(world, call) for what, call in (calls | {PADDED: _padded(calls["none"])}).items()}
    for step in (steps["value"], steps["ours"]):
        step()  # states of Adam come to be before any memory is measured
    held = torch.cuda.memory_allocated() / 1e6
    peaks = {what: _peak(ctx, what, step) for what, step in steps.items()}
    alive = {what: step for what, step in steps.items() if not step.lost and peaks[what] is not None}
    times = clock.in_turns(dict(alive), ROUNDS, lambda: ctx.left() - SPARE)
    for what, step in steps.items():
        if step.lost:  # of a rival that is a result
            ctx.row(**about, step=what, **{"failed" if what in OURS else "out_of_memory": step.lost})
        elif what in times:
            ctx.row(**about, step=what, **_cells(times, peaks, what, world.size.tokens), held_mb=round(held))
    for rival in ("materialised", "responses"):
        if steps[rival].lost:
            continue
        with ctx.attempt(f"agreement with {rival}, {name}"):
            ctx.row(**about, step=f"ours against {rival}", **agreement(world, rival))


def _policy(ctx: Context, shape: Shape) -> Policy:
    """A model of random weights, drawn where it will be."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from trainer.models.attention import NAME
    from trainer.models.policy import Policy
    from trainer.models.tiny import word_tokenizer

    class Chosen(Policy):
        """A dry run interprets the kernels that a GPU would run, and takes none of a CPU's."""

        @property
        def head(self) -> dict[str, Any]:
            return super().head | {"backend": ctx.backend}

    config = Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(ctx.place):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    return Chosen(model, word_tokenizer([f"word{i}" for i in range(shape.vocab)]))


def _size(shape: Shape, dry: bool) -> Size:
    from benchmarks.work.update import Size

    tokens, length, prompt = (64, 16, 4) if dry else (8192, 512, 64)
    return Size(tokens, length, prompt, shape.vocab, shape.hidden, shape.layers)


def _policy_call(world: World, loss: str) -> Callable[[], None]:
    from benchmarks.work.update import LOSSES

    return lambda: world.policy_step(LOSSES[loss])


def _padded(call: Callable[[], None]) -> Callable[[], None]:
    """The same with the attention that every device has."""
    from trainer.models import attention

    def padded() -> None:
        with patch.object(attention, "_fusible", lambda *_: False):
            call()

    return padded


def attention_way(ctx: Context, policy: Policy, padding: ExitStack) -> str:
    """The name of the attention that packed sequences take; where that fails, padding takes its place.

    Args:
        ctx: Gets the failure as a row.
        policy: Whose forward and backward are tried.
        padding: Keeps the replacement in place until it is closed.
    """
    from trainer.data.packing import Sample, pack
    from trainer.models import attention

    packed = pack([Sample([1, 2, 3], 1), Sample([4, 5], 1)], ctx.place)
    for _ in range(2):
        with ExitStack() as watch:
            seen = {
                name: watch.enter_context(patch.object(attention, name, wraps=getattr(attention, name)))
                for name in ("padded_attention", "torch_attention", "fused_attention")
            }
            with ctx.attempt("the trainer's attention"):
                with torch.autocast(ctx.place, torch.bfloat16):
                    hidden = policy.hidden(packed)
                hidden.square().mean().backward()
                policy.zero_grad()
                if seen["padded_attention"].called:
                    return "padded SDPA"
                return "varlen_attn of torch" if seen["torch_attention"].called else "flash-attn"
        padding.enter_context(patch.object(attention, "_fusible", lambda *_: False))
    raise RuntimeError("no attention works here")


def _peak(ctx: Context, what: str, step: Step) -> float | None:
    """Megabytes of one step beyond what is held between steps; None where it fails."""
    with ctx.attempt(f"update, {what}"):
        step()
        return clock.peak(step)
    return None


def _cells(times: dict[str, list[float]], peaks: dict[str, float | None], what: str, tokens: int) -> dict[str, Any]:
    """Of one step, and of an update that is this step of the policy and one of the value model."""
    own = times[what]
    cells: dict[str, Any] = {
        "ms": median(own), "min_ms": min(own), "max_ms": max(own), "rounds": len(own),
        "tokens_per_s": round(1e3 * tokens / median(own)), "peak_mb": peaks[what],
    }  # fmt: skip
    if what == "value":
        return cells
    if "value" in times:
        both = [a + b for a, b in zip(own, times["value"], strict=False)]
        cells |= {"update_ms": median(both), "update_tokens_per_s": round(1e3 * tokens / median(both))}
    if what != "ours" and "ours" in times:
        cells["ours_to_this"] = median(a / b for a, b in zip(times["ours"], own, strict=False))
    return cells


def agreement(world: World, rival: str) -> dict[str, float | bool]:
    """How far our loss and the head's gradient are from a rival's in the first micro-batch, relatively."""
    from benchmarks.work.update import LOSSES
    from trainer.training.precision import autocast

    part = world.rollout.parts(range(len(world.rollout.scores)), world.cfg.max_tokens)[0]
    found = []
    for name in ("ours", rival):
        try:
            with autocast(world.cfg, world.device):
                loss = LOSSES[name](world, part).loss
            loss.backward()
            assert world.policy.weight.grad is not None
            found.append((float(loss.detach()), world.policy.weight.grad))
        finally:
            world.optimizers[0].adam.zero_grad()
    (ours, gradient), (theirs, other) = found
    apart = float((gradient - other).norm() / other.norm())
    return {"loss": abs(ours - theirs) / max(abs(theirs), 1e-3), "head_gradient": apart, "ok": apart < CLOSE}
