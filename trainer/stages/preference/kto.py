"""KTO: learning from single replies that are labelled desirable or not.

Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import rlhf_kernels as rk
from trainer.data.encoding import encode_pairs, told_apart
from trainer.data.packing import Sample
from trainer.models.policy import Policy
from trainer.run.log import RunLog
from trainer.stages.preference import loop as preference
from trainer.stages.preference.loop import ReferenceConfig
from trainer.stages.preference.replies import Part, Replies, ReplyTotals, Unit


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferenceConfig):
    """KTO on {"prompt", "response", "label"} records, or on pairs, whose two replies count one by one."""

    batch_size: int = 64
    """Replies per step; the KL is estimated over them, so a handful is too few."""
    desirable_weight: float = 1.0
    """Of desirable replies; raise it where they are the fewer."""
    undesirable_weight: float = 1.0
    """Of the others; the published advice is 1 to 4/3 for weight times number, desirable to undesirable."""


def kto(cfg: KTOConfig, log: RunLog | None = None, *, resume: bool = False) -> Policy:
    """Trains a policy; see ``preference.train``."""
    return preference.train_preference(cfg, KTO(cfg), log, resume=resume)


class KTO(preference.PreferenceMethod):
    """The loss, and the point from which gains and losses are counted.

    That point is the KL from policy to reference, estimated over the whole step from replies to *other* prompts: each
    sample i has a mismatched one, i + n, of its own prompt and the reply of another.
    """

    name, kind = "kto", "labelled"

    def __init__(self, cfg: KTOConfig) -> None:
        if cfg.batch_size < 2:
            raise ValueError(f"batch_size: got {cfg.batch_size}, want at least 2, over which the KL is estimated")
        self.cfg, self.kl, self.max_length = cfg, 0.0, cfg.max_length

    def encode(
        self, tokenizer: Any, records: Sequence[dict[str, Any]], note: Callable[[str], None] | None = None
    ) -> Replies:
        """Replies one by one, and as many mismatched ones behind them.

        Raises:
            ValueError: There is only one reply, so that none can be mismatched.
        """
        prompts = [r["prompt"] for r in records for _ in r["responses"]]
        replies = [x for r in records for x in r["responses"]]
        sizes = [len(r["responses"]) for r in records]
        found = iter(encode_pairs(tokenizer, prompts, replies, self.max_length, note=note, groups=sizes))
        groups = [(record, list(islice(found, size))) for record, size in zip(records, sizes, strict=True)]
        kept = told_apart(groups, [(of, record["labels"]) for record, of in groups], self.max_length, note)
        good = [x for record, _ in kept for x in record["labels"]]
        samples = [x for _, of in kept for x in of]
        if len(samples) < 2:
            raise ValueError("data: want at least two labelled replies, to mismatch prompts and replies")
        other = _derangement([repr(str(record["prompt"])) for record, of in kept for _ in of], self.cfg.seed)
        mismatched = [_exchanged(s, samples[k], self.max_length) for s, k in zip(samples, other, strict=True)]
        return Replies(samples + mismatched, good * 2, [(i,) for i in range(len(samples))])

    def before(
        self, policy: Policy, replies: Replies, units: Sequence[Unit], parts: Callable[[Sequence[Unit]], list[Part]]
    ) -> None:
        """Estimates the KL over all of the step's mismatched replies."""
        total, count = 0.0, len(replies.units)
        for part in parts([(i + count,) for (i,) in units]):
            assert part.ref_logp is not None
            total += float((policy.stats(part.packed).logp - part.ref_logp).sum())
        self.kl = max(total / len(units), 0.0)

    def loss(self, policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        """Of gains for desirable and losses for undesirable replies, as people weigh them."""
        cfg, packed = self.cfg, part.packed
        assert part.ref_logp is not None
        return rk.kto_loss(
            policy.hidden(packed), policy.weight, packed.targets, packed.cu_seqlens, part.ref_logp, part.good, self.kl,
            beta=cfg.beta, desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight,
            num_sequences=totals.units, **policy.head,
        )  # fmt: skip


def _derangement(prompts: Sequence[str], seed: int) -> list[int]:
    """For each index another one, of another prompt as long as no prompt has more than half of the replies.

    Replies of a prompt stand together in a random circle, and each is given the reply so far on that nobody is left
    among the replies to its own prompt.
    """
    source = random.Random(seed)
    replies: dict[str, list[int]] = {}
    for i in source.sample(range(len(prompts)), len(prompts)):
        replies.setdefault(prompts[i], []).append(i)
    circle = [i for group in replies.values() for i in group]
    far = max(map(len, replies.values()))
    other = [0] * len(circle)
    for at, here in enumerate(circle):
        other[here] = circle[(at + far) % len(circle)] if far < len(circle) else circle[(at + 1) % len(circle)]
    return other


def _exchanged(mine: Sample, theirs: Sample, max_length: int) -> Sample:
    """The prompt of one sample with the reply of another."""
    tokens = mine.tokens[: mine.prompt_length] + theirs.tokens[theirs.prompt_length :]
    return Sample(tokens[:max_length], mine.prompt_length)
