"""The way for losses: evaluate the objective span by span and take its gradient in the same pass, 6 N H V in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.engine.boundary import (
    cast_inputs,
    cast_reference,
    first_derivative,
    refuse_tangents,
    without_autocast,
)
from rlhf_kernels.engine.call import Call, RefArgument, prepare
from rlhf_kernels.engine.compiled import one_break
from rlhf_kernels.engine.op import padded
from rlhf_kernels.engine.span import Gradients, Span, stats_dtype
from rlhf_kernels.types import Grads, HeadOptions, LossOutput, Objective, TokenStats


class Metrics(dict[str, Tensor]):
    """Whoever asks for one of them hears of what a GPU has found wrong meanwhile."""

    def __getitem__(self, name: str) -> Tensor:
        check.report()
        return super().__getitem__(name)


@dataclass(frozen=True)
class Batch:
    """What the objective is given beside the statistics."""

    objective: Objective
    per_token: tuple[Tensor, ...]  # each [N]
    per_sequence: tuple[Tensor, ...]  # each [S]
    cu_kept: Tensor | None  # [S+1] boundaries in kept rows, on the CPU and the device of hidden
    unit: int

    def spans(self, rows: int, most: int) -> list[tuple[int, int, int, int]]:
        """(first row, last row, first sequence, last sequence) of spans of whole units with at most ``most`` rows."""
        if self.cu_kept is None:
            size = max(1, -(-rows // max(1, -(-rows // most))))
            return [(a, min(a + size, rows), 0, 0) for a in range(0, rows, size)] or [(0, 0, 0, 0)]
        ends = self.cu_kept.tolist()
        spans, first = [], 0
        for s in range(0, len(ends) - 1, self.unit):
            if s > first and ends[s + self.unit] - ends[first] > most:
                spans.append((ends[first], ends[s], first, s))
                first = s
        return [*spans, (ends[first], ends[-1], first, len(ends) - 1)]


def _stream(call: Call, batch: Batch, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    """Loss, metrics and gradients; the latter times ``call.loss_scale``."""
    call = call.at_once() if wanted[1] else call
    into = Gradients.of(call, wanted)
    loss = torch.zeros((), dtype=stats_dtype(call.hidden.dtype), device=call.hidden.device)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    if call.kept.real is not None:
        loss, sums = _of_nothing(batch, call.kept.real, loss)
    for start, stop, first, last in batch.spans(call.rows, call.tile_rows()):
        span = Span(call, start, stop, any(wanted))
        part, metrics, grads = _objective(call, batch, span, first, last, any(wanted))
        if any(wanted):
            span.backward(grads, into)
        loss = loss + part
        for name, (total, count) in metrics.items():
            before = sums.get(name)
            sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
    logged = {name: total / count.clamp(min=1e-30) for name, (total, count) in sums.items()}
    lost = {} if call.tolerance is None else into.losses.metrics(loss)
    return loss, logged | lost, into.filled()


def _of_nothing(batch: Batch, real: Tensor, zero: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Minus what rows that stand for nothing will contribute: they are all alike, and objectives are additive."""
    blank = zero.new_zeros(1)
    count = real.numel() - real.sum()
    given = [x.new_zeros(1) for x in batch.per_token]
    stats = TokenStats(blank, blank, blank, blank, blank, blank)
    with torch.no_grad():
        value, metrics = _answer(batch.objective(stats, None, *given))
    return zero - count * value, {name: (-count * x, -count * n) for name, (x, n) in metrics.items()}


def _answer(found: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What an objective returned, if it is what one may return."""
    want = "to return (scalar tensor, {name: (sum, count)}) with tensors in it"
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and isinstance(found[1], dict)
    check.wants(pair and found[0].dim() == 0, "objective", found, want)
    for name, metric in found[1].items():
        fits = isinstance(metric, tuple) and len(metric) == 2 and all(isinstance(x, Tensor) for x in metric)
        check.wants(fits, f"objective: {name}", metric, want)
    return found


def _objective(
    call: Call, batch: Batch, span: Span, first: int, last: int, wants_grad: bool
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Grads]:
    """The objective's value on one span, and its gradient with respect to the span's statistics."""
    stats = span.stats._replace(logp=span.stats.logp.squeeze(1))
    stats = stats.each(lambda x: call.kept.only_real(x, span.start))
    cu = None if batch.cu_kept is None else batch.cu_kept[first : last + 1].to(call.hidden.device) - span.start
    tokens = [call.kept.pick(x, span.start, span.stop) for x in batch.per_token]
    leaves = stats.each(lambda x: x.detach().requires_grad_(wants_grad))
    with torch.set_grad_enabled(wants_grad):
        value, metrics = _answer(batch.objective(leaves, cu, *tokens, *(x[first:last] for x in batch.per_sequence)))
    named = [leaves.logp, leaves.entropy, leaves.lse, leaves.mean_logit, leaves.kl]
    found: list[Tensor | None] = [None] * 5
    if wants_grad and value.requires_grad:
        asked = [x for x in named if x is not None]
        answers = iter(torch.autograd.grad(value, asked, allow_unused=True))
        found = [None if x is None else next(answers) for x in named]
    logp, *rest = (g if g is None or call.loss_scale == 1.0 else g * call.loss_scale for g in found)
    logp = torch.zeros_like(leaves.logp, requires_grad=False) if logp is None else logp
    grads = Grads(logp[:, None], *rest)
    return value.detach(), metrics, grads.each(lambda g: call.kept.only_real(g, span.start))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, batch: Batch,
        wanted: tuple[bool, bool, bool], metrics: dict[str, Tensor],
    ):  # fmt: skip
        if any(wanted) and call.weight_grad is not None and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "weight_grad: got a call under activation checkpointing, which runs it twice and would add the "
                "gradient twice; wants weight_grad=None there"
            )
        loss, found, grads = _stream(call.bind(hidden, weight, bias), batch, wanted)
        metrics.update(found)
        if any(wanted):
            ctx.save_for_backward(hidden, weight, bias)
            ctx.call, ctx.batch, ctx.wanted, ctx.found = call, batch, wanted, {"grads": grads}
        return loss

    jvp = staticmethod(refuse_tangents)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, saved: tuple[Tensor, ...], upstream: Tensor):
        call: Call = ctx.call
        # They are handed over and not kept: gradients as large as the head exist once, and one thread has them.
        grads: Gradients | None = ctx.found.pop("grads", None)
        if call.weight_grad is not None and ctx.wanted[1]:
            if grads is None:
                raise RuntimeError("weight_grad: got a second backward, wants one; the gradient has been added already")
            same = upstream == call.loss_scale
            message = f"loss_scale: wants the factor that reaches the loss in backward, got {call.loss_scale}"
            check.holds(same, message if upstream.is_cuda else f"{message} while {float(upstream)} reached it")
        hidden, weight, bias = saved
        if grads is None:
            grads = _stream(call.bind(hidden, weight, bias), ctx.batch, ctx.wanted)[2]
        scale = upstream / call.loss_scale
        if upstream.is_cuda or float(scale) != 1.0:
            # That of a backend is for a factor that only the device knows: it touches nothing where that is one.
            rescale = getattr(call.backend, "rescale", Tensor.mul_)
            for g in (grads.hidden, None if call.weight_grad is not None else grads.weight, grads.bias):
                if g is not None:
                    rescale(g, scale)
        return (
            None if grads.hidden is None else grads.hidden.to(hidden.dtype).view(hidden.shape),
            None if call.weight_grad is not None else padded(grads.weight, weight, weight.dtype),
            padded(grads.bias, bias, weight.dtype),
            *(None,) * 4,
        )


def _batch(
    call: Call, objective: Objective, per_token: Sequence[Tensor], per_sequence: Sequence[Tensor],
    cu_seqlens: Tensor | None, unit: int, lead: torch.Size,
) -> Batch:  # fmt: skip
    for name, group in (("per_token", per_token), ("per_sequence", per_sequence)):
        check.wants(isinstance(group, (tuple, list)), name, group, "a tuple or list of tensors")
    check.wants(callable(objective), "objective", objective, "a function")
    check.wants(check.is_count(unit), "unit", unit, "a positive whole number of sequences")
    rows, device = call.targets.shape[0], call.hidden.device
    cu_kept = None
    bounded = call.kept.real is not None
    check.wants(cu_seqlens is None or not bounded, "max_targets", "a bound", "None where a loss needs whole sequences")
    if cu_seqlens is not None:
        cu = check.cu_seqlens_of("cu_seqlens", cu_seqlens, rows, device, call.checks)
        sequences = cu.numel() - 1
        check.wants(sequences % unit == 0, "cu_seqlens", cu_seqlens, f"a multiple of {unit} sequences, got {sequences}")
        cu_kept = (cu if call.kept.index is None else torch.searchsorted(call.kept.index, cu)).cpu()
    else:
        check.wants(not per_sequence and unit == 1, "cu_seqlens", None, "a tensor where there are sequences")
    for i, x in enumerate(per_token):
        check.shaped(f"per_token[{i}]", x, tuple(lead), device, "aligned with targets")
    for i, x in enumerate(per_sequence):
        check.tensor(f"per_sequence[{i}]", x)
        fits = cu_kept is not None and x.shape[:1] == (cu_kept.numel() - 1,) and x.device == device
        check.wants(fits, f"per_sequence[{i}]", x, f"one entry per sequence, on {device}")
    free = "a tensor without gradient: detach it, or build your loss on token_stats"
    for kind, group in (("per_token", per_token), ("per_sequence", per_sequence)):
        for i, x in enumerate(group):
            check.wants(not x.requires_grad, f"{kind}[{i}]", x, free)
    each, whole = (tuple(map(check.for_autograd, group)) for group in (per_token, per_sequence))
    return Batch(objective, tuple(x.reshape(-1) for x in each), whole, cu_kept, unit)


@one_break
def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    per_token: Sequence[Tensor] = (),
    per_sequence: Sequence[Tensor] = (),
    cu_seqlens: Tensor | None = None,
    unit: int = 1,
    ref: RefArgument = None,
    ref_head: HeadOptions | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Any loss of the token statistics, with its gradient taken in the forward pass.

    Rows are streamed through the head in spans that fit ``max_bytes``. On each span the objective is evaluated and
    differentiated, and the gradient goes straight into those of hidden and weight: three matrix products of size
    N H V, never a fourth, however little memory is allowed, as long as one unit fits. A unit that does not fit is
    computed twice. Rows whose gradient is exactly zero take part in the first product only.

    Args:
        hidden: [..., H] last hidden states.
        weight: [V, H] language-model head, of the same dtype.
        targets: [...] int64 token of each position; rows with ``ignore_index`` never meet the head.
        objective: ``objective(stats, cu_seqlens, *per_token, *per_sequence) -> (scalar, {name: (sum, count)})``.
            It runs without autocast and sees kept rows only, ``cu_seqlens`` counting them. It must be additive over
            units (and, with ``max_targets``, finite where all that it is given is zero).
        per_token: tensors shaped like ``targets``; values at ignored positions never matter. ``checks`` does not look
            into them, nor into ``per_sequence``: what they may hold only the objective knows.
        per_sequence: tensors [S, ...].
        cu_seqlens: [S+1] boundaries of the given rows, ignored ones included.
        unit: sequences that must be seen together (2 for preference pairs).
        ref: (ref_hidden, ref_weight); then ``stats.kl`` is the exact KL(policy | reference).
        ref_head: bias, softcap and logit_scale of the reference's head; None: as the policy's, which then has no bias.
        **head: see ``HeadOptions``.

    Returns:
        ``LossOutput``: the sum of the objective over all units, and sum / count of each metric.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.

    >>> def nll(stats, cu_seqlens):
    ...     return -stats.logp.sum(), {"entropy": (stats.entropy.detach().sum(), stats.entropy.new_tensor(3.0))}
    >>> rk.fused_loss(torch.randn(3, 4), torch.zeros(8, 4), torch.tensor([1, 2, 3]), nll).loss
    tensor(6.2383)
    """
    check.float_tensor("weight", weight, 2)
    hidden, weight, bias = cast_inputs(hidden, weight, head.get("bias"))  # type: ignore[assignment]
    head["bias"] = bias
    ref, ref_head = cast_reference(ref, ref_head)
    with without_autocast(hidden):
        call = prepare(hidden, weight, targets, 0, ref, ref_head, "reverse", **head)
        batch = _batch(call, objective, per_token, per_sequence, cu_seqlens, unit, targets.shape)
        on = torch.is_grad_enabled()
        wanted = (
            on and hidden.requires_grad,
            on and weight.requires_grad,
            on and bias is not None and bias.requires_grad,
        )
        metrics = Metrics()
        loss = _FusedLoss.apply(hidden, weight, bias, call, batch, wanted, metrics)
    return LossOutput(loss, metrics)  # type: ignore[arg-type]
