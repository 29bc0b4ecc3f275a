"""Policy-gradient losses straight from hidden states.

PPO, https://arxiv.org/abs/1707.06347, and GRPO, https://arxiv.org/abs/2402.03300, are one loss: they differ in where
the advantages come from. DAPO, Dr.GRPO, GSPO and CISPO are choices of clip, denominator, ratio and clip rule.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from rlhf_kernels.checks import cu_seqlens_of, finite, float_tensor, holds, shaped, wanted, wants
from rlhf_kernels.engine import compilable_loss, fused_loss
from rlhf_kernels.losses.reduce import Count, kept_lengths, kept_targets, token_reduction, total
from rlhf_kernels.losses.surrogate import Metrics, PolicyTerms
from rlhf_kernels.segments import spread
from rlhf_kernels.types import HeadOptions, LossOutput, TokenStats

METRICS = "approx_kl", "clipfrac", "clipfrac_low", "clipfrac_high", "ratio", "entropy"


@compilable_loss(*METRICS, kl=("ref_logp", "ref"), clipfrac_dual=("dual_clip",))
def ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    clip_rule: str = "ppo",
    ratio: str = "token",
    entropy_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    ref: tuple[Tensor, Tensor] | None = None,
    ref_head: HeadOptions | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    token_weight: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    cu_seqlens: Tensor | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Clipped policy loss with entropy bonus and KL control, straight from hidden states.

    Per kept token: ``token_weight * (-min(r A, clip(r, 1 - low, 1 + high) A) + kl_coef * KL - entropy_coef * entropy)``
    (PPO, Eq. 7), reduced as ``reduction`` says. Named variants are combinations:

    * dual clip (https://arxiv.org/abs/1912.09729): ``dual_clip=3.0``; bounds the loss where A < 0 only;
    * DAPO (https://arxiv.org/abs/2503.14476, Eq. 8): ``clip=(0.2, 0.28)`` and ``token_mean``;
    * Dr.GRPO (https://arxiv.org/abs/2503.20783): ``token_mean`` with ``num_tokens = S * max_length``;
    * GSPO (https://arxiv.org/abs/2507.18071, Eq. 5, 7, 14): ``ratio="sequence"``, ``reduction="sequence_mean"``,
      ``clip=(3e-4, 4e-4)``;
    * CISPO (https://arxiv.org/abs/2506.13585, Eq. 4 and 5): ``clip_rule="cispo"``; the ratio, kept in
      [1 - low, 1 + high], is a constant weight of ``A * logp``.

    Cost: three GEMMs, no recomputation, as long as a unit (a token; a sequence with ``ratio="sequence"``) fits the byte
    budget; tokens whose gradient is exactly zero (masked, clipped, zero advantage) skip the last two.

    Args:
        hidden: [..., H] last hidden states, aligned with ``targets``; float32, bfloat16, float16 or float64.
        weight: [V, H] language-model head, dtype of ``hidden``.
        targets: [...] sampled tokens, int64 or int32; ``ignore_index`` marks prompt and padding.
        old_logp: [...] log-probabilities in nats under the policy that sampled; None is on-policy (ratio one).
        advantages: [...] one per token, or [S] one per sequence; then ``cu_seqlens`` strictly increases.
        clip: how far the ratio may fall below and rise above one: (0.2, 0.28) allows 0.8 to 1.28.
        dual_clip: largest ratio that counts where the advantage is negative; above one.
        clip_rule: "ppo" or "cispo".
        ratio: "token", or "sequence" for the geometric mean over the sequence's kept tokens (needs ``cu_seqlens``).
        entropy_coef: weight of the entropy bonus, per nat.
        ref_logp: [...] log-probabilities under the reference policy, for the sampled KL estimators.
        ref: (ref_hidden [..., H'], ref_weight [V, H']) for ``kl="exact"``, over the whole vocabulary in the same pass.
        ref_head: ``bias``, ``softcap`` and ``logit_scale`` of the reference's head; the temperature is the policy's.
        kl_coef: weight of the KL to the reference, per nat; zero logs it only.
        kl: "k2", "k3", "k1+" or "k3+" (the value of k1 or k3 with the gradient of k2), or "exact".
        token_weight: [...] factor of everything a token contributes, such as a truncated importance weight; it does
            not enter the denominator.
        reduction: "token_mean", "sequence_mean" (tokens, then sequences) or "sequence_sum" (sum, then mean).
        num_tokens: global denominator of ``token_mean``; the kept tokens of this call if None.
        num_sequences: global denominator of the other two; the sequences here that have a kept token if None.
        cu_seqlens: [S+1] boundaries of the rows given, ignored ones included.
        **head: see ``HeadOptions``.

    Returns:
        The loss, and ``approx_kl``, ``clipfrac``, ``clipfrac_low``, ``clipfrac_high``, ``ratio``, ``entropy``, with a
        reference ``kl`` and with ``dual_clip`` ``clipfrac_dual``: means over kept tokens. All masked: zero, with zero
        gradient.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a wrong shape, dtype or device; an unknown name; a negative clip; ``kl="k1"`` as a loss term.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> out = rk.ppo_loss(h, w, y, None, torch.ones(5), clip=(0.2, 0.28))
    >>> out.metrics["ratio"].item(), out.metrics["clipfrac"].item()
    (1.0, 0.0)
    """
    terms = PolicyTerms(clip, dual_clip, clip_rule, ratio, entropy_coef, kl_coef, kl)
    _check_reference(terms, ref_logp, ref)
    kept, checks = kept_targets(hidden, targets, head.get("ignore_index", -100)), wanted(head)
    cu = cu_seqlens
    if cu is not None:
        cu = cu_seqlens_of("cu_seqlens", cu, targets.numel(), targets.device, checks)
    wants(ratio == "token" or cu is not None, "cu_seqlens", None, "sequence boundaries [S+1] for ratio='sequence'")
    weight_of_token, over = token_reduction(reduction, kept, cu, num_tokens, num_sequences, checks)

    given = {
        "advantages": _each_token("advantages", advantages, kept, cu, checks),
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "token_weight": token_weight,
        "mean": weight_of_token,
    }
    for name in ("old_logp", "ref_logp", "token_weight"):
        if given[name] is not None:
            float_tensor(name, given[name])
            shaped(name, given[name], tuple(targets.shape), targets.device, "that of targets")
    if checks:
        finite(kept, **{name: given[name] for name in ("old_logp", "ref_logp", "token_weight")})
    names = [name for name, x in given.items() if x is not None]

    def objective(stats: TokenStats, cu: Tensor | None, *columns: Tensor) -> tuple[Tensor, Metrics]:
        column = dict(zip(names, columns, strict=True))
        loss, metrics = terms.per_token(stats, cu, column["advantages"], column.get("old_logp"), column.get("ref_logp"))
        if "token_weight" in column:
            loss = column["token_weight"].to(loss.dtype) * loss
        return total(loss, over, column.get("mean")), metrics

    return fused_loss(
        hidden,
        weight,
        targets,
        objective,
        per_token=tuple(given[name].detach() for name in names),  # type: ignore[union-attr]
        cu_seqlens=cu if ratio == "sequence" else None,  # whole sequences in a chunk only where a ratio needs them
        ref=ref,
        ref_head=ref_head,
        **head,
    )


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    clip_rule: str = "ppo",
    ratio: str = "token",
    entropy_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    ref: tuple[Tensor, Tensor] | None = None,
    ref_head: HeadOptions | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    token_weight: Tensor | None = None,
    reduction: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    cu_seqlens: Tensor | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Group-relative policy optimisation: ``ppo_loss`` fed with the advantages of ``group_advantages``.

    GRPO (https://arxiv.org/abs/2402.03300, Eq. 3 and 4) as published is ``reduction="sequence_mean"``, ``kl="k3"`` and
    ``kl_coef=0.04``; the default ``token_mean`` is DAPO's, which does not favour short wrong replies. BNPO is
    ``token_mean`` over this call's tokens, Dr.GRPO ``token_mean`` with ``num_tokens = S * max_length`` and
    ``group_advantages(scale=None)``.

    Arguments, errors, metrics and cost (three GEMMs, no recomputation) are those of ``ppo_loss``.

    >>> h, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
    >>> advantages = rk.group_advantages(torch.tensor([1.0, 0.0]), 2)
    >>> rk.grpo_loss(h, w, y, None, advantages, cu_seqlens=torch.tensor([0, 2, 6])).loss.shape
    torch.Size([])
    """
    return ppo_loss(
        hidden,
        weight,
        targets,
        old_logp,
        advantages,
        clip=clip,
        dual_clip=dual_clip,
        clip_rule=clip_rule,
        ratio=ratio,
        entropy_coef=entropy_coef,
        ref_logp=ref_logp,
        ref=ref,
        ref_head=ref_head,
        kl_coef=kl_coef,
        kl=kl,
        token_weight=token_weight,
        reduction=reduction,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        cu_seqlens=cu_seqlens,
        **head,
    )


def _check_reference(terms: PolicyTerms, ref_logp: Tensor | None, ref: tuple[Tensor, Tensor] | None) -> None:
    exact = terms.kl == "exact"
    wants(ref is None or exact, "kl", terms.kl, "'exact' where ref=(ref_hidden, ref_weight) is given")
    wants(ref_logp is None or not exact, "ref_logp", ref_logp, "None with kl='exact', which takes ref")
    name, given = ("ref", ref) if exact else ("ref_logp", ref_logp)
    wants(not terms.kl_coef or given is not None, name, None, f"a reference for kl_coef={terms.kl_coef}")


def _each_token(name: str, x: Tensor, kept: Tensor, cu_seqlens: Tensor | None, checks: bool) -> Tensor:
    """Shaped like ``kept`` [...]; a value per sequence is repeated along it."""
    float_tensor(name, x)
    if x.shape == kept.shape:
        wants(x.device == kept.device, name, x, f"device {kept.device}, where targets is")
        if checks:
            finite(kept, **{name: x})
        return x
    wants(cu_seqlens is not None, name, x, f"shape {list(kept.shape)}, or [S] together with cu_seqlens")
    assert cu_seqlens is not None
    shaped(name, x, (cu_seqlens.numel() - 1,), kept.device, "one per sequence, or that of targets")
    if checks:
        holds((cu_seqlens.diff() > 0).all(), f"cu_seqlens: wants to strictly increase where {name} is one per sequence")
        finite(kept_lengths(kept, cu_seqlens) > 0, **{name: x})
    return spread(x, cu_seqlens, kept.numel()).reshape(kept.shape)
