"""From scores and values to advantages: shaped rewards, GAE, group baselines, whitening.

Legend: N packed rows, S sequences. bfloat16 and float16 come in, float32 comes out; float64 stays.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.backends import resolve
from rlhf_kernels.backends.gae import implementation
from rlhf_kernels.estimators import VALUES, kl_estimate
from rlhf_kernels.segments import acting, group_layout, segment_sum

EPS = 1e-8  # added to the variance in whitening


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    checks: bool = True,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over packed sequences (https://arxiv.org/abs/1506.02438, Eq. 11 and 12).

    ``A[t] = delta[t] + gamma * lam * A[t']`` with ``delta[t] = r[t] + gamma * V[t'] - V[t]``, where t' is the next row
    *with mask*: tool output and observations are stepped over as if they were not there; neither their values nor
    the number of them matters. C++ on a CPU; on a GPU Triton or CUDA in two launches, whitening included (which then
    sees advantages before they are rounded to float32); plain torch elsewhere.

    Args:
        rewards: [N] reward of each token, any float dtype.
        values: [N] value of the state in which each token was chosen; no gradient flows.
        cu_seqlens: [S+1] int32 or int64 boundaries.
        gamma: discount per kept token, 0 to 1.
        lam: 0 is one-step, 1 is Monte Carlo.
        mask: [N] bool, true where the policy acted. None: everywhere.
        bootstrap: [S] value of the state after the last token of each sequence: the value model's for a truncated
            one, zero for one that ended. None: all ended.
        whiten: give the advantages of this call mean zero and variance one over ``mask``; returns are not touched.
        checks: look into the data: boundaries, no reward on masked rows, and nothing NaN or infinite where it counts.

    Returns:
        (advantages, returns), [N] float32 (float64 for float64 values), zero where ``mask`` is false;
        returns are advantages before whitening plus values.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape, dtype or device, a discount out of range, or a non-zero reward on a masked row,
            which would be lost.

    >>> rewards, values = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
    >>> rk.gae(rewards, values, torch.tensor([0, 2, 3]), lam=1.0)
    (tensor([0.5000, 0.5000, 1.0000]), tensor([1., 1., 1.]))
    """
    check.no_transforms()
    check.flags(whiten=whiten, checks=checks)
    check.float_tensor("rewards", rewards, 1)
    check.float_tensor("values", values, 1)
    shape, device = tuple(rewards.shape), rewards.device
    check.shaped("values", values, shape, device, "that of rewards")
    cu = check.cu_seqlens_of("cu_seqlens", cu_seqlens, rewards.numel(), device, checks)
    for name, x in (("gamma", gamma), ("lam", lam)):
        check.wants(check.is_number(x) and 0 <= x <= 1, name, x, "a number from 0 to 1")
    if bootstrap is not None:
        check.float_tensor("bootstrap", bootstrap, 1)
        check.shaped("bootstrap", bootstrap, (cu.numel() - 1,), device, "one per sequence")
    if mask is not None:
        _check_mask(mask, shape, device)
        if checks:
            lost = (rewards != 0) & ~mask
            check.holds(~lost.any(), "rewards: got a non-zero reward where mask is false, wants zero: it would be lost")
    if checks:
        check.finite(mask, rewards=rewards, values=values)
        check.finite(lambda: acting(cu, mask), bootstrap=bootstrap)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    r, v = rewards.detach().to(dtype).contiguous(), values.detach().to(dtype).contiguous()
    after = None if bootstrap is None else bootstrap.detach().to(dtype).contiguous()
    # Each of them takes float64 too, which heads do not.
    backend = implementation(resolve("auto", device, torch.float32), device)
    args = r, v, cu.contiguous(), None if mask is None else mask.contiguous(), after, gamma, lam
    if whiten and hasattr(backend, "whitened_gae"):
        return backend.whitened_gae(*args, EPS)
    advantages, returns = backend.gae(*args)
    return (_whiten(advantages, mask, eps=EPS) if whiten else advantages), returns


def shaped_rewards(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float | Tensor,
    mask: Tensor | None = None,
    kl: str = "k1",
    kl_clip: float | None = None,
    checks: bool = True,
) -> tuple[Tensor, Tensor]:
    """Per-token rewards of RLHF: ``-beta * kl`` on every row, and the score on the last one with ``mask``.

    https://arxiv.org/abs/1909.08593, Eq. 2, spread over tokens; k1 is its estimator
    (http://joschu.net/blog/kl-approx.html). In Triton two launches, in plain torch a dozen.

    Args:
        scores: [S] of the reward model, any float dtype.
        logp: [N] log-probabilities in nats under the policy that sampled.
        ref_logp: [N] the same under the reference.
        cu_seqlens: [S+1] boundaries.
        beta: price of a nat, zero or more; a number or a 0-d tensor.
        mask: [N] bool, true where the policy acted. None: everywhere.
        kl: "k1", "k2" or "k3".
        kl_clip: bound of a row's |kl| in the rewards, positive. None: none.
        checks: look into the data: boundaries, ``beta``, and nothing NaN or infinite where it counts.

    Returns:
        (rewards [N], kl [S]), float32 (float64 for float64): rewards are zero where ``mask`` is false; ``kl`` is each
        sequence's sum in nats, unclipped, which is what a KL controller steers. A sequence without mask has nowhere to
        put its score.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape, dtype or device, an unknown estimator or a negative ``beta``.

    >>> logp, ref_logp = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -1.0])
    >>> rk.shaped_rewards(torch.tensor([1.0, 0.0]), logp, ref_logp, torch.tensor([0, 2, 3]), beta=0.5)
    (tensor([-0.2500,  1.0000,  0.5000]), tensor([ 0.5000, -1.0000]))
    """
    check.no_transforms()
    check.flags(checks=checks)
    for name, x in (("scores", scores), ("logp", logp), ("ref_logp", ref_logp)):
        check.float_tensor(name, x, 1)
    shape, device = tuple(logp.shape), logp.device
    check.shaped("ref_logp", ref_logp, shape, device, "that of logp")
    cu = check.cu_seqlens_of("cu_seqlens", cu_seqlens, logp.numel(), device, checks)
    check.shaped("scores", scores, (cu.numel() - 1,), device, "one per sequence")
    check.one_of("kl", kl, VALUES)
    check.wants(
        kl_clip is None or (check.is_number(kl_clip) and kl_clip > 0), "kl_clip", kl_clip, "a positive number, or None"
    )
    if isinstance(beta, Tensor):
        check.float_tensor("beta", beta)
        check.wants(beta.dim() == 0, "beta", beta, "a number or a 0-d tensor")
        beta = beta.detach().to(device)
        if checks:
            check.holds(torch.isfinite(beta) & (beta >= 0), "beta: wants a finite number, zero or more")
    else:
        check.wants(check.is_finite(beta) and beta >= 0, "beta", beta, "a finite number, zero or more")
    kept = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    _check_mask(kept, shape, device)
    if checks:
        check.finite(kept, logp=logp, ref_logp=ref_logp)
        check.finite(lambda: acting(cu, kept), scores=scores)

    dtype = torch.promote_types(torch.promote_types(logp.dtype, ref_logp.dtype), torch.float32)
    scores, logp, ref_logp = (x.detach().to(dtype).contiguous() for x in (scores, logp, ref_logp))
    backend = implementation(resolve("auto", device, torch.float32), device)
    if hasattr(backend, "shaped_rewards"):
        return backend.shaped_rewards(scores, logp, ref_logp, cu.contiguous(), kept.contiguous(), beta, kl, kl_clip)
    estimate = kl_estimate(logp, ref_logp, kl).where(kept, 0.0)
    priced = estimate if kl_clip is None else estimate.clamp(-kl_clip, kl_clip)
    rows = logp.numel()
    position = torch.arange(rows, device=device)
    # cummax at a sequence's end is its last row with mask, unless it has none; slot ``rows`` takes such scores away.
    last = torch.cat([position.new_full((1,), -1), position.where(kept, -1)]).cummax(0).values[cu[1:]]
    last = last.where(last >= cu[:-1], rows)
    rewards = estimate.new_zeros(rows + 1)
    rewards[last] = scores
    return (rewards[:rows] - beta * priced).to(dtype), segment_sum(estimate, cu)


def group_advantages(
    scores: Tensor,
    groups: int | Tensor,
    *,
    baseline: str = "mean",
    scale: str | None = "group_std",
    eps: float = 1e-6,
    checks: bool = True,
) -> Tensor:
    """Advantages of sampled replies against others to the same prompt (GRPO, https://arxiv.org/abs/2402.03300, 4.1.2).

    ``(score - baseline) / (std + eps)``.

    Args:
        scores: [S] rewards, any float dtype.
        groups: K for consecutive groups of K, or [S] integer ids in any order.
        baseline: "mean" of the group, or "leave_one_out", the mean of the others (RLOO,
            https://arxiv.org/abs/2402.14740).
        scale: "group_std", "batch_std" over all scores given, or None (Dr.GRPO, https://arxiv.org/abs/2503.20783).
            Standard deviations are biased (divided by n) and about the mean whatever the baseline.
        eps: added to the standard deviation, zero or more.
        checks: look into the data: nothing NaN or infinite.

    Returns:
        [S] float32 (float64 for float64); zero for the only member of a group, which has nothing to be compared with.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: K does not divide S, a wrong shape or dtype, or an unknown name.

    >>> rk.group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), 2, scale=None)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    check.flags(checks=checks)
    check.float_tensor("scores", scores, 1)
    check.one_of("baseline", baseline, ("mean", "leave_one_out"))
    check.one_of("scale", scale, ("group_std", "batch_std", None))
    check.wants(check.is_finite(eps) and eps >= 0, "eps", eps, "a finite number, zero or more")
    layout = group_layout(groups, scores)
    if checks:
        check.finite(scores=scores)
    # In double the mean of equal float32 scores is exact, so a group without contrast gets zeros and not noise / eps.
    flat = scores.detach().double()
    x = layout.gather(flat).where(layout.member, 0.0)
    count = layout.member.sum(1, keepdim=True)
    centred = (x - x.sum(1, keepdim=True) / count).where(layout.member, 0.0)
    advantages = centred if baseline == "mean" else centred * count / (count - 1).clamp(min=1)
    if scale is not None:
        square = centred.square().sum(1, keepdim=True) / count
        if scale == "batch_std":
            square = flat.var(correction=0) if flat.numel() else flat.sum()
        advantages = advantages / (square.sqrt() + eps)
    advantages = advantages.where(layout.member & (count > 1), 0.0)
    return layout.scatter(advantages, scores.numel()).to(torch.promote_types(scores.dtype, torch.float32))


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = EPS,
    process_group: dist.ProcessGroup | None = None,
    checks: bool = True,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over the rows with ``mask``, with the biased variance; one row becomes zero.

    Args:
        x: [...] any float dtype.
        mask: [...] bool, true where a value counts. None: everywhere. Values elsewhere never matter.
        shift_mean: False puts the mean back, so that only the scale changes.
        eps: added to the variance, positive.
        process_group: take mean and variance over all ranks of this group, which must all call. None: this call only.
        checks: look into the data: nothing NaN or infinite where ``mask`` is true. With ``process_group`` nothing is
            looked at, since one rank that stops leaves the others waiting: a NaN then shows in the results of all.

    Returns:
        [...] float32 (float64 for float64), zero where ``mask`` is false.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a wrong shape, dtype or device, or ``eps`` not positive.

    >>> rk.whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    check.flags(shift_mean=shift_mean, checks=checks)
    check.float_tensor("x", x)
    check.process_group("process_group", process_group)
    check.wants(check.is_finite(eps) and eps > 0, "eps", eps, "a positive finite number")
    if mask is not None:
        _check_mask(mask, tuple(x.shape), x.device)
    if checks and process_group is None:
        check.finite(mask, x=x)
    return _whiten(x, mask, shift_mean, eps, process_group)


def _whiten(
    x: Tensor, mask: Tensor | None, shift_mean: bool = True, eps: float = EPS, group: dist.ProcessGroup | None = None
) -> Tensor:
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    values = x.detach().double().where(kept, 0.0)

    def everywhere(sums: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(sums, group=group)
        return sums

    total, count = everywhere(torch.stack([values.sum(), kept.sum().double()])).unbind()
    mean = total / count.clamp(min=1)
    centred = (values - mean).where(kept, 0.0)
    var = everywhere(centred.square().sum()) / count.clamp(min=1)
    white = centred * (var + eps).rsqrt() + (0.0 if shift_mean else mean)
    return cast(Tensor, white.where(kept, 0.0).to(torch.promote_types(x.dtype, torch.float32)))


def _check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check.bool_tensor("mask", mask, shape, device, "one per row")
