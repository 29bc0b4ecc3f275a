"""DPO, IPO, ORPO and SimPO: stages that learn from pairs of a chosen and a rejected reply to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import rlhf_kernels as rk
from trainer.data.encoding import encode_pairs, told_apart
from trainer.models.policy import Policy
from trainer.run.log import RunLog
from trainer.stages.preference import loop as preference
from trainer.stages.preference.loop import PreferenceConfig, ReferenceConfig
from trainer.stages.preference.replies import Part, Replies, ReplyTotals


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ReferenceConfig):
    """DPO on pairs {"prompt", "chosen", "rejected"} or ranked lists."""

    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """Of the difference of implicit rewards."""
    label_smoothing: float = 0.0
    """Share of pairs that annotators get wrong."""
    length_normalize: bool = False
    """Rewards per token instead of per reply."""
    margin: float = 0.0
    """How much better the chosen reply should be, in units of reward."""
    sft_coef: float = 0.0
    """Weight of the chosen replies' negative log-likelihood per token."""


@dataclass(frozen=True, kw_only=True)
class IPOConfig(ReferenceConfig):
    """IPO on pairs {"prompt", "chosen", "rejected"} or ranked lists."""

    length_normalize: bool = True
    """Log-ratios per token instead of per reply."""


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(PreferenceConfig):
    """ORPO on pairs {"prompt", "chosen", "rejected"} or ranked lists; it needs no reference and no SFT before it."""

    beta: float = 0.1
    """Weight of the odds ratio beside the chosen replies' negative log-likelihood."""


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(PreferenceConfig):
    """SimPO on pairs {"prompt", "chosen", "rejected"} or ranked lists; it needs no reference."""

    beta: float = 2.0
    """Reward per nat of a reply's mean log-probability."""
    margin: float = 1.0
    """How much better the chosen reply should be, in units of reward."""
    label_smoothing: float = 0.0
    """Share of pairs that annotators get wrong."""
    sft_coef: float = 0.0
    """Weight of the chosen replies' negative log-likelihood per token."""


def dpo(cfg: DPOConfig, log: RunLog | None = None, *, resume: bool = False) -> Policy:
    """Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7."""

    def loss(policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        assert part.ref_logp is not None
        return rk.dpo_loss(
            *_rows(policy, part), part.ref_logp, num_pairs=totals.units,
            beta=cfg.beta, loss=cfg.loss, label_smoothing=cfg.label_smoothing, length_normalize=cfg.length_normalize,
            margin=cfg.margin, sft_coef=cfg.sft_coef, **policy.head,
        )  # fmt: skip

    return preference.train_preference(cfg, Pairs("dpo", cfg.max_length, loss), log, resume=resume)


def ipo(cfg: IPOConfig, log: RunLog | None = None, *, resume: bool = False) -> Policy:
    """Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17."""

    def loss(policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        assert part.ref_logp is not None
        return rk.ipo_loss(
            *_rows(policy, part), part.ref_logp, num_pairs=totals.units,
            beta=cfg.beta, length_normalize=cfg.length_normalize, **policy.head,
        )  # fmt: skip

    return preference.train_preference(cfg, Pairs("ipo", cfg.max_length, loss), log, resume=resume)


def orpo(cfg: ORPOConfig, log: RunLog | None = None, *, resume: bool = False) -> Policy:
    """Hong et al. 2024, https://arxiv.org/abs/2403.07691, equation 6."""

    def loss(policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        return rk.orpo_loss(
            *_rows(policy, part), num_pairs=totals.units, num_tokens=totals.tokens, beta=cfg.beta, **policy.head
        )

    return preference.train_preference(cfg, Pairs("orpo", cfg.max_length, loss), log, resume=resume)


def simpo(cfg: SimPOConfig, log: RunLog | None = None, *, resume: bool = False) -> Policy:
    """Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6."""

    def loss(policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        return rk.simpo_loss(
            *_rows(policy, part), num_pairs=totals.units,
            beta=cfg.beta, margin=cfg.margin, label_smoothing=cfg.label_smoothing, sft_coef=cfg.sft_coef,
            **policy.head,
        )  # fmt: skip

    return preference.train_preference(cfg, Pairs("simpo", cfg.max_length, loss), log, resume=resume)


class Pairs(preference.PreferenceMethod):
    """A loss of pairs; a ranked list stands for all its pairs of unequal rank.

    Args:
        name: Of the stage.
        max_length: Tokens per sample.
        loss: Of a policy, a micro-batch and the denominators of its step.
    """

    kind = "ranked"

    def __init__(self, name: str, max_length: int, loss: Callable[[Policy, Part, ReplyTotals], rk.LossOutput]) -> None:
        self.name, self.max_length, self.loss_of_pairs = name, max_length, loss

    def loss(self, policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        """As given."""
        return self.loss_of_pairs(policy, part, totals)

    def encode(
        self, tokenizer: Any, records: Sequence[dict[str, Any]], note: Callable[[str], None] | None = None
    ) -> Replies:
        """Sample 2i is the chosen reply of pair i, and 2i + 1 the rejected one."""
        prompts: list[str] = []
        replies: list[str] = []
        for record in records:
            for i, j in combinations(range(len(record["ranks"])), 2):
                by_rank = sorted((record["ranks"][k], record["responses"][k]) for k in (i, j))
                if by_rank[0][0] != by_rank[1][0]:
                    prompts += [record["prompt"]] * 2
                    replies += [text for _, text in by_rank]
        pairs = [2] * (len(prompts) // 2)
        found = encode_pairs(tokenizer, prompts, replies, self.max_length, note=note, groups=pairs)
        both = [found[k : k + 2] for k in range(0, len(found), 2)]
        kept = told_apart(both, [(pair, (0, 1)) for pair in both], self.max_length, note)
        samples = [sample for pair in kept for sample in pair]
        units = [(k, k + 1) for k in range(0, len(samples), 2)]
        return Replies(samples, [True, False] * len(units), units)


def _rows(policy: Policy, part: Part) -> tuple[Any, Any, Any, Any]:
    packed = part.packed
    return policy.hidden(packed), policy.weight, packed.targets, packed.cu_seqlens
