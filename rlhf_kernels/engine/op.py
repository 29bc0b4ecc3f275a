"""The way for anybody's loss: statistics as a differentiable op over all rows, within a byte budget."""

from __future__ import annotations

from dataclasses import replace
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
from rlhf_kernels.engine.compiled import compilable_statistics
from rlhf_kernels.engine.span import Gradients, Span, stats_dtype
from rlhf_kernels.types import Grads, HeadOptions, TokenStats


def padded(grad: Tensor | None, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in its tensor's dtype and shape, zero in columns that do not exist."""
    if grad is None or like is None:
        return None
    grad = grad.to(dtype)
    if grad.shape[0] == like.shape[0]:
        return grad.view(like.shape)
    return torch.cat([grad, grad.new_zeros(like.shape[0] - grad.shape[0], *grad.shape[1:])])


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call, keep: bool):
        ctx.set_materialize_grads(False)
        call = call.bind(hidden, weight, bias)
        span = Span(call, 0, call.rows, keep)
        if keep:
            ctx.save_for_backward(hidden, weight, bias)
            ctx.call, ctx.span, ctx.given_up = call, span, False
        full = tuple(None if x is None else _scatter(x, call) for x in span.stats)
        if full[4] is not None:
            ctx.mark_non_differentiable(full[4])
        return full

    jvp = staticmethod(refuse_tangents)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, saved: tuple[Tensor, ...], *upstream: Tensor | None):
        hidden, weight, bias = saved
        call: Call = ctx.call.bind(hidden, weight, bias)
        grads = _gather(upstream, call)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        into = Gradients.of(call, wanted)
        if call.overwrite:
            _give_up(ctx, hidden)
            into.hidden = call.hidden
        ctx.span.call = call
        ctx.span.backward(grads, into)
        ctx.span.call = ctx.call  # statistics that live on shall not keep this head's scratch
        if call.overwrite and call.kept.index is not None:
            call.hidden.masked_fill_(call.kept.ignored(call.kept.index, call.targets.shape[0])[:, None], 0.0)
        into.filled()
        return (
            padded(None if into.hidden is None else into.hidden.view(hidden.shape), hidden, hidden.dtype),
            None if call.weight_grad is not None else padded(into.weight, weight, hidden.dtype),
            padded(into.bias, bias, hidden.dtype),
            None,
            None,
        )


def _give_up(ctx: Any, logits: Tensor) -> None:
    """These logits will be a gradient: whoever else has kept them for a backward must hear of it."""
    if ctx.given_up:
        raise RuntimeError("overwrite: got a second backward, wants one; the logits have become their gradient")
    ctx.given_up = True
    torch.autograd.graph.increment_version(logits)


def _scatter(x: Tensor, call: Call) -> Tensor:
    """From kept rows to all rows, zero elsewhere."""
    if x.dim() == 2 and call.ignored is not None:
        x = x.masked_fill(call.kept.pick(call.ignored, 0, call.rows), 0.0)
    if call.kept.index is None:
        return x
    full = x.new_zeros(call.targets.shape[0], *x.shape[1:])
    call.kept.put(x, 0, full)
    return full


def _gather(upstream: tuple[Tensor | None, ...], call: Call) -> Grads:
    """From all rows to kept rows; what nobody asked for is None."""
    logp, entropy, lse, mean_logit, _, kl = (None if g is None else call.kept.pick(g, 0, call.rows) for g in upstream)
    if logp is None:
        dtype, device = stats_dtype(call.hidden.dtype), call.hidden.device
        logp = torch.zeros(call.rows, call.targets.shape[1], dtype=dtype, device=device)
    elif call.ignored is not None:
        logp = logp.masked_fill(call.kept.pick(call.ignored, 0, call.rows), 0.0)
    return Grads(logp, entropy, lse, mean_logit, kl)


def _run(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _TokenStats.apply(hidden, weight, bias, call, keep)  # type: ignore[no-any-return]


def _statistics(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, per_position: int, ref: RefArgument,
    ref_head: HeadOptions | None, direction: str, head: HeadOptions, overwrite: bool = False,
) -> TokenStats:  # fmt: skip
    if weight is not None:  # Ready logits meet no product, so autocast leaves them as they are.
        hidden, weight, head["bias"] = cast_inputs(hidden, weight, head.get("bias"))  # type: ignore[assignment]
        ref, ref_head = cast_reference(ref, ref_head)
    with without_autocast(hidden):
        names = ("ref_hidden", "ref_weight")
        call = prepare(hidden, weight, targets, per_position, ref, ref_head, direction, names, **head)
        call = replace(call, overwrite=overwrite)
        logp, *rest = _run(hidden, weight, head.get("bias"), call)
    shape = hidden.shape[:-1]
    return TokenStats(logp.reshape(targets.shape), *(None if x is None else x.view(shape) for x in rest))  # type: ignore[arg-type]


@compilable_statistics("logp", "entropy", "lse", "mean_logit", "top1")
def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Unpack[HeadOptions]) -> TokenStats:
    """Differentiable statistics of each token's distribution, straight from hidden states.

    Four matrix products of size N H V with gradients (logits twice) where the logits do not fit ``max_bytes``,
    three where they do; one without gradients. The full logits never exist beyond ``max_bytes``.

    Args:
        hidden: [..., H] last hidden states, float32, bfloat16, float16 or float64.
        weight: [V, H] language-model head, of the same dtype.
        targets: [...] int64 token predicted at each position; ``ignore_index`` (-100) where there is none.
        **head: see ``HeadOptions``.

    Returns:
        ``TokenStats`` shaped like ``targets``: float32 (float64 for float64 inputs), in nats, zero where ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.

    >>> hidden, weight = torch.eye(3), torch.zeros(4, 3)
    >>> rk.token_stats(hidden, weight, torch.tensor([0, 3, -100])).entropy
    tensor([1.3863, 1.3863, 0.0000])
    """
    check.float_tensor("weight", weight, 2)
    return _statistics(hidden, weight, targets, 0, None, None, "reverse", head)


@compilable_statistics("logp", "entropy", "lse", "mean_logit", "top1")
def token_stats_from_logits(
    logits: Tensor, targets: Tensor, *, overwrite: bool = False, **head: Unpack[HeadOptions]
) -> TokenStats:
    """``token_stats`` for a trainer that already holds its logits.

    Args:
        logits: [..., V] in any float dtype; without ``overwrite`` they are left as they are.
        targets: [...] int64 token of each position; ``ignore_index`` where there is none.
        overwrite: let backward write the gradient over the logits, so that no second tensor of their size is needed.
            They must be contiguous, and nobody may need them afterwards; autograd says so if somebody does. Not
            together with a ``vocab_size`` that leaves out columns.
        **head: see ``HeadOptions``; temperature, softcap, logit_scale and bias act on the logits as on a head's, and
            columns beyond ``vocab_size`` do not exist. Autocast leaves logits as they are.

    Returns:
        ``TokenStats`` shaped like ``targets``, with the same numerics as ``token_stats``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.

    >>> rk.token_stats_from_logits(torch.zeros(1, 4), torch.tensor([2])).logp
    tensor([-1.3863])
    """
    check.float_tensor("logits", logits)
    check.flags(overwrite=overwrite)
    check.wants(logits.dim() > 0, "logits", logits, "[..., V]")
    if head.get("vocab_size") is not None and head.get("tp_group") is None:
        logits = _cut(logits, overwrite, head)
    if overwrite:
        check.wants(logits.is_contiguous(), "logits", logits, "contiguous memory to overwrite")
    return _statistics(logits, None, targets, 0, None, None, "reverse", head, overwrite)


def _cut(logits: Tensor, overwrite: bool, head: HeadOptions) -> Tensor:
    """Without the columns that do not exist, in the bias too."""
    vocab, width, bias = head.get("vocab_size"), logits.shape[-1], head.get("bias")
    check.wants(check.is_count(vocab) and vocab <= width, "vocab_size", vocab, f"1 to {width}, the columns of logits")
    if vocab == width:
        return logits
    check.wants(not overwrite, "overwrite", True, "False where vocab_size leaves out columns, which have no gradient")
    if bias is not None:
        check.shaped("bias", bias, (width,), logits.device, "one per column of logits")
        head["bias"] = bias[:vocab]
    head["vocab_size"] = None
    return logits[..., :vocab]


@compilable_statistics("logp")
def token_logps(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Unpack[HeadOptions]) -> Tensor:
    """Log-probabilities of K chosen tokens at each position (distillation, top-k), differentiable.

    Args:
        hidden: [..., H] last hidden states.
        weight: [V, H] language-model head.
        token_ids: [..., K] int64 ids; ``ignore_index`` where there is none.
        **head: see ``HeadOptions``.

    Returns:
        [..., K] float32 (float64 for float64 inputs), in nats, zero where ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.

    >>> rk.token_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([[0, 1, 2], [3, -100, 0]]))
    tensor([[-1.3863, -1.3863, -1.3863],
            [-1.3863,  0.0000, -1.3863]])
    """
    check.float_tensor("weight", weight, 2)
    check.tensor("token_ids", token_ids, "an integer tensor [..., K]")
    check.wants(token_ids.dim() > 0 and token_ids.shape[-1] > 0, "token_ids", token_ids, "[..., K], K of one or more")
    return _statistics(hidden, weight, token_ids, 1, None, None, "reverse", head).logp


@compilable_statistics("kl")
def kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    *,
    direction: str = "reverse",
    ref_head: HeadOptions | None = None,
    **head: Unpack[HeadOptions],
) -> Tensor:
    """Exact KL between policy and a frozen reference at each token, over the whole vocabulary, differentiable.

    Both heads are read in one pass; neither's logits exist beyond ``max_bytes``. ``"reverse"`` is KL(policy |
    reference), the penalty of RLHF; ``"forward"`` is KL(reference | policy), as in distillation.

    Args:
        hidden: [..., H] last hidden states of the policy.
        weight: [V, H] its head.
        ref_hidden: [..., H'] last hidden states of the reference; no gradient flows into them.
        ref_weight: [V, H'] its head.
        targets: [...] int64; only ``ignore_index`` matters here.
        direction: ``"reverse"`` or ``"forward"``.
        ref_head: bias, softcap and logit_scale of the reference's head; None: as the policy's, which then has no bias.
            The temperature is the policy's.
        **head: see ``HeadOptions``.

    Returns:
        [...] float32 (float64 for float64 inputs), in nats, zero where ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.

    >>> x, w = torch.randn(3, 4), torch.randn(7, 4)
    >>> rk.kl_divergence(x, w, x, w, torch.tensor([1, 2, -100]))
    tensor([0., 0., 0.])
    """
    for name, x in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("weight", weight)):
        check.float_tensor(name, x)
    kl = _statistics(hidden, weight, targets, 0, (ref_hidden, ref_weight), ref_head, direction, head).kl
    assert kl is not None
    return kl
