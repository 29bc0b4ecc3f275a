"""DPO, IPO, ORPO, SimPO: for (chosen, rejected) pairs an implicit reward each, and a loss of its difference."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from rlhf_kernels.checks import flags, float_tensor, one_of, positive, wants
from rlhf_kernels.engine import compilable_loss
from rlhf_kernels.losses.pairs import (
    Anchor,
    check_coef,
    check_label_smoothing,
    hinge_loss,
    log_odds,
    log_sigmoid_loss,
    preference_loss,
)
from rlhf_kernels.losses.reduce import Count
from rlhf_kernels.types import HeadOptions, LossOutput

METRICS = "rewards/chosen", "rewards/rejected", "margin", "accuracy", "logp/chosen", "logp/rejected"


@compilable_loss(*METRICS, nll=("sft_coef",))
def dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    *,
    beta: float = 0.1,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    margin: float | Tensor | None = None,
    sft_coef: float = 0.0,
    num_pairs: Count | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Direct preference optimisation, https://arxiv.org/abs/2305.18290, Eq. 7.

    ``-log sigmoid(chosen - rejected - margin)`` of the replies' implicit rewards ``beta * log(policy / reference)``.

    Cost: three GEMMs, no recomputation, as long as a pair fits the byte budget.

    Args:
        hidden: [..., H] last hidden states, aligned with ``targets``; sequences 2i chosen, 2i + 1 rejected.
        weight: [V, H] language-model head, dtype of ``hidden``.
        targets: [...] tokens of the replies; ``ignore_index`` marks prompt and padding.
        cu_seqlens: [S+1] boundaries of the rows given, ignored ones included; S is even.
        ref_logp: [...] log-probabilities in nats under the reference, or [S] summed over each reply's kept tokens;
            then ``cu_seqlens`` strictly increases.
        beta: strength of the pull to the reference, positive.
        loss: "sigmoid", or "hinge" for ``max(0, 1 - u)`` (hinge-norm, https://arxiv.org/abs/2309.06657).
        label_smoothing: rate of wrong labels, 0 to 0.5 (conservative DPO,
            https://ericmitchell.ai/cdpo.pdf); mixes in the loss of the flipped pair, hinge included.
        length_normalize: mean instead of summed log-ratios per reply.
        margin: number or [S/2], how much better the chosen reply should be (https://arxiv.org/abs/2402.10571).
        sft_coef: weight of the chosen replies' length-normalised negative log-likelihood
            (https://arxiv.org/abs/2404.19733, Eq. 1).
        num_pairs: global denominator; the pairs here with kept tokens on both sides if None. Others count nowhere.
        **head: see ``HeadOptions``.

    Returns:
        The loss, and means over pairs: ``rewards/chosen``, ``rewards/rejected``, ``margin`` (their difference),
        ``accuracy``, ``logp/chosen``, ``logp/rejected`` (summed), and ``nll`` per chosen token with ``sft_coef``.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: an odd number of sequences; a wrong shape, dtype or device; ``beta`` not positive; unknown ``loss``.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> cu_seqlens = torch.tensor([0, 2, 5])
    >>> ref_logp = rk.token_stats(h, w, y).logp
    >>> rk.dpo_loss(h, w, y, cu_seqlens, ref_logp).loss  # at the reference: log 2
    tensor(0.6931)
    """
    positive("beta", beta)
    one_of("loss", loss, ("sigmoid", "hinge"))
    check_label_smoothing(label_smoothing)
    check_coef("sft_coef", sft_coef)
    float_tensor("ref_logp", ref_logp)
    flags(length_normalize=length_normalize)
    return preference_loss(
        hidden,
        weight,
        targets,
        cu_seqlens,
        ref_logp,
        lambda log_ratio, length: beta * (log_ratio / length if length_normalize else log_ratio),
        log_sigmoid_loss(label_smoothing) if loss == "sigmoid" else hinge_loss(label_smoothing),
        margin=margin,
        anchor=Anchor(sft_coef, per_token=False) if sft_coef else None,
        num_pairs=num_pairs,
        **head,
    )


@compilable_loss(*METRICS)
def ipo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    *,
    beta: float = 0.1,
    length_normalize: bool = True,
    num_pairs: Count | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Identity preference optimisation, https://arxiv.org/abs/2310.12036, Eq. 17 with tau = beta.

    ``(h - 1 / (2 beta))^2`` where h is the chosen less the rejected log-ratio to the reference. The paper's bandit has
    no lengths; ratios are means over a reply's kept tokens by default, since the target gap does not grow with length.

    Cost: three GEMMs, no recomputation, as long as a pair fits the byte budget. Arguments, errors and metrics are
    those of ``dpo_loss``; rewards are ``beta`` times the log-ratios.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> ref_logp = rk.token_stats(h, w, y).logp
    >>> rk.ipo_loss(h, w, y, torch.tensor([0, 2, 5]), ref_logp, beta=0.5).loss  # at the reference: 1 / (2 beta)^2
    tensor(1.)
    """
    positive("beta", beta)
    float_tensor("ref_logp", ref_logp)
    flags(length_normalize=length_normalize)
    return preference_loss(
        hidden,
        weight,
        targets,
        cu_seqlens,
        ref_logp,
        lambda log_ratio, length: beta * (log_ratio / length if length_normalize else log_ratio),
        lambda gain: (gain / beta - 1 / (2 * beta)).square(),
        num_pairs=num_pairs,
        **head,
    )


@compilable_loss(*METRICS, "nll")
def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 0.1,
    num_pairs: Count | None = None,
    num_tokens: Count | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Odds-ratio preference optimisation, https://arxiv.org/abs/2403.07691, Eq. 6 and 7 with lambda = beta.

    The negative log-likelihood of the chosen replies, plus ``beta * -log sigmoid`` of the log odds ratio, where a
    reply's probability is the geometric mean over its kept tokens. Needs no reference.

    Cost: three GEMMs, no recomputation, as long as a pair fits the byte budget. Arguments and errors as in
    ``dpo_loss``.

    Args:
        beta: weight of the odds-ratio term, positive.
        num_pairs: global denominator of the odds-ratio term; the pairs here with tokens on both sides if None.
        num_tokens: global denominator of the likelihood term; the kept tokens of chosen replies here if None.

    Returns:
        The loss and the metrics of ``dpo_loss``; rewards are log odds, ``nll`` is per chosen token.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> sorted(rk.orpo_loss(h, w, y, torch.tensor([0, 2, 5])).metrics)[:3]
    ['accuracy', 'logp/chosen', 'logp/rejected']
    """
    positive("beta", beta)
    log_sigmoid = log_sigmoid_loss()
    return preference_loss(
        hidden,
        weight,
        targets,
        cu_seqlens,
        None,
        lambda logp, length: log_odds(logp / length),
        lambda gain: beta * log_sigmoid(gain),
        anchor=Anchor(1.0, per_token=True, num_tokens=num_tokens),
        num_pairs=num_pairs,
        **head,
    )


@compilable_loss(*METRICS, nll=("sft_coef",))
def simpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 2.0,
    margin: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
    num_pairs: Count | None = None,
    **head: Unpack[HeadOptions],
) -> LossOutput:
    """Simple preference optimisation, https://arxiv.org/abs/2405.14734, Eq. 6.

    The implicit reward is ``beta`` times the mean log-probability of a reply's kept tokens; no reference.

    Cost: three GEMMs, no recomputation, as long as a pair fits the byte budget. Arguments, errors and metrics as in
    ``dpo_loss``; ``margin`` is the paper's gamma, in units of reward.

    >>> h, w, y = torch.zeros(5, 8), torch.zeros(11, 8), torch.arange(5)
    >>> rk.simpo_loss(h, w, y, torch.tensor([0, 2, 5]), margin=0.0).loss  # equal means: log 2
    tensor(0.6931)
    """
    positive("beta", beta)
    wants(margin is not None, "margin", None, "a finite number or one per pair")
    check_label_smoothing(label_smoothing)
    check_coef("sft_coef", sft_coef)
    return preference_loss(
        hidden,
        weight,
        targets,
        cu_seqlens,
        None,
        lambda logp, length: beta * (logp / length),
        log_sigmoid_loss(label_smoothing),
        margin=margin,
        anchor=Anchor(sft_coef, per_token=False) if sft_coef else None,
        num_pairs=num_pairs,
        **head,
    )
