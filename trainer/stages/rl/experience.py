"""One rollout with everything that the update needs, in packed rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trainer.base import ranks
from trainer.data.packing import Packed, within_budget
from trainer.models.policy import Policy, ScalarModel
from trainer.rewards.shaping import Scored, shaped
from trainer.rewards.truncation import own_score_counts
from trainer.sampling.rollout import Rollout, sample
from trainer.stages.rl.shared_value import SharedValue

if TYPE_CHECKING:
    from trainer.stages.rl.options import RLConfig

PER_SEQUENCE = ("scores", "truncated")


@dataclass(frozen=True)
class Experience:
    """Packed responses and what was known about them before the update. [N] tensors are zero outside the mask."""

    packed: Packed
    old_logp: Tensor  # [N]
    ref_logp: Tensor  # [N]
    entropy: Tensor  # [N]
    scores: Tensor  # [S]
    truncated: Tensor  # [S] bool
    values: Tensor | None = None  # [N], where there is a value model
    token_weight: Tensor | None = None  # [N], where sampler and trainer are not taken for equal
    advantages: Tensor | None = None  # [N]
    returns: Tensor | None = None  # [N], where there is a value model

    def select(self, indices: Sequence[int]) -> Experience:
        """The given sequences."""
        packed, rows = self.packed.select(indices)
        chosen = torch.tensor(indices, device=self.scores.device)
        columns: dict[str, Tensor | None] = {}
        for field in dataclasses.fields(self)[1:]:
            x = getattr(self, field.name)
            columns[field.name] = None if x is None else x[chosen if field.name in PER_SEQUENCE else rows]
        return Experience(packed, **columns)  # type: ignore[arg-type]

    def kept(self, indices: Sequence[int] | None) -> Experience | None:
        """Some sequences, or all where ``indices`` is None; None if that leaves nothing."""
        return self if indices is None else self.select(indices) if indices else None

    def parts(self, chosen: Sequence[int], max_tokens: int) -> list[Experience]:
        """Micro-batches of the chosen sequences."""
        parts = within_budget([self.packed.lengths[i] for i in chosen], max_tokens)
        return [self.select([chosen[i] for i in part]) for part in parts]


def in_parts(packed: Packed, max_tokens: int, score: Callable[[Packed], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Per-row results of ``score``, within the token budget, joined again."""
    parts = within_budget(packed.lengths, max_tokens)
    if len(parts) == 1:
        return score(packed)
    results = [score(packed.select(part)[0]) for part in parts]
    return tuple(torch.cat(columns) for columns in zip(*results, strict=True))


class Collected(NamedTuple):
    """A rollout and what is known about it."""

    experience: Experience | None
    """Still without advantages; None if there is nothing to learn."""
    metrics: dict[str, float]
    """What to log about it."""
    rollout: Rollout
    scores: Tensor
    """[S] as the rewards gave them, before length, ends and truncation change them."""


Scoring = Callable[[Rollout, Sequence[dict[str, Any]]], Scored]
"""Of a rollout and its prompts' records."""


@torch.no_grad()
def collect(
    cfg: RLConfig,
    policy: Policy,
    reference: Policy,
    value: ScalarModel | SharedValue | None,
    rewards: Scoring,
    prompts: Sequence[list[int]],
    records: Sequence[dict[str, Any]],
    generator: torch.Generator,
    nothing_in: Callable[[Tensor], bool] = lambda _: False,
) -> Collected:
    """Samples one response per prompt, scores it, and looks at it with every model.

    Log-probabilities come from the training forward, never from the sampler, so that the first ratio is one.

    Args:
        cfg: The configuration.
        policy: Samples.
        reference: What the KL is measured to.
        value: The value model, where there is one.
        rewards: Gives the scores.
        prompts: Token ids of each.
        records: Of each, for the reward.
        generator: Of the sampling.
        nothing_in: Whether the scores, [S] as the policy gets them, leave nothing to learn; then no model looks.
    """
    began = perf_counter()
    rollout = sample(
        policy, prompts,
        max_new_tokens=cfg.max_new_tokens, generator=generator, temperature=cfg.temperature, top_p=cfg.top_p,
        sampler=cfg.sampler, batch_size=cfg.sample_batch,
    )  # fmt: skip
    sampled = perf_counter()
    device = policy.weight.device
    packed = rollout.pack(device)
    truncated = torch.tensor(rollout.truncated, device=device)
    found = rewards(rollout, records)
    raw = scores = ranks.from_first(found.scores.cpu()).to(device)
    lengths = torch.tensor([float(len(rollout.response(i))) for i in range(len(prompts))])
    metrics = {
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std(unbiased=False)),
        "response/length": float(lengths.mean()),
        "response/truncated": sum(rollout.truncated) / len(rollout.truncated),
        "val/num_eos_tokens": float((~truncated).sum()),
    }
    if not own_score_counts(cfg):
        metrics["response/ignored"] = metrics["response/truncated"]
    scores = shaped(cfg, scores, lengths.to(device), truncated)
    metrics |= found.metrics | {"timing/generation": sampled - began, "timing/scoring": perf_counter() - sampled}
    if nothing_in(scores):
        return Collected(None, metrics, rollout, raw)

    def score(part: Packed) -> tuple[Tensor, ...]:
        stats = policy.stats(part, cfg.temperature)
        seen = stats.logp, stats.entropy, reference.stats(part, cfg.temperature).logp
        return seen if value is None else (*seen, value.values(part))

    logp, entropy, ref_logp, *values = in_parts(packed, cfg.max_tokens, score)
    weight, agreement = importance(logp, rollout.logp_of(packed), packed.mask, cfg.importance_cap)
    metrics |= agreement | {
        "rollout/sampler_delta": rollout.sampler_delta(packed, logp),
        "timing/scoring": perf_counter() - sampled,
    }
    experience = Experience(packed, logp, ref_logp, entropy, scores, truncated, *values, token_weight=weight)
    return Collected(experience, metrics, rollout, raw)


def importance(
    logp: Tensor, sampler_logp: Tensor, mask: Tensor, cap: float | None
) -> tuple[Tensor | None, dict[str, float]]:
    """Truncated importance weights between sampler and trainer, which run different code on the same weights.

    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl: ``min(trainer / sampler, cap)`` per token.

    Args:
        logp: [N] of the training forward.
        sampler_logp: [N] as the sampler saw it.
        mask: [N] bool, response tokens.
        cap: Largest weight; None leaves the weights out.

    Returns:
        The weights [N], one outside the mask, or None; and the ratio's extremes, the effective sample size
        ``(sum w)^2 / (n sum w^2)`` of what counts, and the share of tokens that the cap holds.
    """
    ratio = torch.where(mask, (logp - sampler_logp).double(), 0.0).exp()
    kept = ratio[mask]
    counted = kept if cap is None else kept.clamp(max=cap)
    size = max(len(kept), 1)
    metrics = {
        "sampling/importance_ratio_min": float(kept.min()),
        "sampling/importance_ratio_max": float(kept.max()),
        "sampling/ess": float(counted.sum().square() / (size * counted.square().sum())),
    }
    if cap is None:
        return None, metrics
    metrics["sampling/capped"] = float((kept > cap).double().mean())
    return ratio.clamp(max=cap).to(logp.dtype), metrics


def objective(batch: Experience, kl: Tensor, kl_coef: float) -> dict[str, float]:
    """What the policy is after: scores [S] less the price of the KL [S], by the names of 2019."""
    return {
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(batch.entropy.sum() / len(batch.scores)),
        "objective/rlhf_reward": float((batch.scores - kl_coef * kl).mean()),
        "objective/non_score_reward": float((-kl_coef * kl).mean()),
    }
