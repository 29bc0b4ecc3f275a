"""The clipped value loss of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.checks import bool_tensor, finite, flags, float_tensor, for_autograd, is_number, shaped, wants
from rlhf_kernels.engine import compilable_loss
from rlhf_kernels.losses.reduce import Count, averages, metric, token_reduction, total
from rlhf_kernels.types import LossOutput


@compilable_loss("values", "returns", "explained_var", clipfrac=("clip",))
def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    cu_seqlens: Tensor | None = None,
    checks: bool = True,
) -> LossOutput:
    """Half the squared error of the value model, pessimistically clipped around the values at sampling time.

    ``0.5 * max((v - R)^2, (clamp(v, old - clip, old + clip) - R)^2)``: the value loss of openai/baselines' ppo2 that
    https://arxiv.org/abs/2006.05990 calls value-function clipping (choice C13); the paper of PPO (Eq. 9) has it
    unclipped. It never meets the head: no GEMM.

    Args:
        values: [...] predictions, any float dtype; computed in float32 (float64 for float64).
        returns: [...] targets, shaped like ``values``; no gradient.
        old_values: [...] predictions at sampling time; needed with ``clip``.
        clip: how far a prediction may move before its loss goes flat, in units of value, positive; None is unclipped.
        mask: [...] bool, true where a value counts; None is everywhere. Values elsewhere never matter, NaN included.
        reduction: "token_mean", "sequence_mean" (tokens, then sequences) or "sequence_sum" (sum, then mean).
        num_tokens: global denominator of ``token_mean``; the unmasked tokens of this call if None.
        num_sequences: global denominator of the other two; the sequences here with an unmasked token if None.
        cu_seqlens: [S+1] boundaries, for the reductions over sequences.
        checks: look into the data: boundaries, denominators, and nothing NaN or infinite where ``mask`` is true.

    Returns:
        The loss, and over unmasked tokens: ``values`` and ``returns`` (means), ``explained_var`` (one less the variance
        of the error over that of the returns; zero if returns are constant) and with ``clip`` ``clipfrac``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape or dtype, ``clip`` not positive or without ``old_values``.

    >>> rk.value_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0])).loss
    tensor(0.2500)
    """
    flags(checks=checks)
    float_tensor("values", values)
    float_tensor("returns", returns)
    shape, device = tuple(values.shape), values.device
    shaped("returns", returns, shape, device, "that of values")
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    bool_tensor("mask", kept, shape, device, "that of values")
    kept = for_autograd(kept)
    if old_values is not None:
        float_tensor("old_values", old_values)
        shaped("old_values", old_values, shape, device, "that of values")
    if clip is not None:
        wants(is_number(clip) and clip > 0, "clip", clip, "a positive number, or None")
        wants(old_values is not None, "old_values", None, "the values at sampling time, shaped like values, with clip")
    if checks:
        finite(kept, values=values, returns=returns, old_values=old_values)
    weight, over = token_reduction(reduction, kept, cu_seqlens, num_tokens, num_sequences, checks)

    dtype = torch.promote_types(values.dtype, torch.float32)
    # Masked before any arithmetic: a NaN times a zero gradient would still be a NaN.
    v, target = values.to(dtype).where(kept, 0.0), returns.detach().to(dtype).where(kept, 0.0)
    error = (v - target).square()
    metrics = {"values": metric(v, kept), "returns": metric(target, kept)}
    if clip is not None and old_values is not None:
        old = old_values.detach().to(dtype).where(kept, 0.0)
        clipped = (old + (v - old).clamp(-clip, clip) - target).square()
        binding = ((v - old).abs() > clip) & (clipped > error)
        error = torch.where(binding, clipped, error)
        metrics["clipfrac"] = metric(binding, kept)
    logged = averages(metrics)
    logged["explained_var"] = _explained_variance((target - v).detach(), target, kept)
    return LossOutput(total(0.5 * error, over, weight), logged)


def _explained_variance(error: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    count = kept.sum().clamp(min=1)

    def variance(x: Tensor) -> Tensor:
        mean = x.double().sum() / count
        return (x.double() - mean).square().where(kept, 0.0).sum() / count

    spread = variance(target)
    explained = 1 - variance(error) / spread.where(spread > 0, 1.0)
    return explained.where(spread > 0, 0.0).to(target.dtype)
