"""One rollout with everything that the update needs, in packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from trainer.models import Policy, ScalarModel
from trainer.packing import Packed, split
from trainer.rewards import Reward
from trainer.rollout import sample

if TYPE_CHECKING:
    from trainer.ppo import PPOConfig


@dataclass(frozen=True)
class Experience:
    """Packed responses and what was known about them before the update. [N] tensors are zero outside the mask."""

    packed: Packed
    old_logp: Tensor  # [N]
    values: Tensor  # [N]
    advantages: Tensor  # [N], whitened over the whole rollout
    returns: Tensor  # [N]
    scores: Tensor  # [S]

    def select(self, indices: Sequence[int]) -> Experience:
        """The given sequences."""
        packed, rows = self.packed.select(indices)
        chosen = torch.tensor(indices, device=self.scores.device)
        return Experience(
            packed, self.old_logp[rows], self.values[rows], self.advantages[rows], self.returns[rows],
            self.scores[chosen],
        )  # fmt: skip


def in_parts(packed: Packed, max_tokens: int, score: Callable[[Packed], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Per-row results of ``score``, within the token budget, joined again."""
    parts = split(packed.lengths, max_tokens)
    if len(parts) == 1:
        return score(packed)
    results = [score(packed.select(part)[0]) for part in parts]
    return tuple(torch.cat(columns) for columns in zip(*results, strict=True))


@torch.no_grad()
def collect(
    cfg: PPOConfig,
    policy: Policy,
    reference: Policy,
    value: ScalarModel,
    reward: Reward,
    beta: float,
    prompts: Sequence[list[int]],
    records: Sequence[dict[str, Any]],
    generator: torch.Generator,
) -> tuple[Experience | None, dict[str, float]]:
    """Samples one response per prompt and scores it.

    Log-probabilities come from the training forward, never from the sampler, so that the first ratio is one.

    Returns:
        The experience, or None if every response was left out as truncated; and what to log about it.
    """
    rollout = sample(
        policy, prompts,
        max_new_tokens=cfg.max_new_tokens, generator=generator, temperature=cfg.temperature,
    )  # fmt: skip
    device = policy.weight.device
    packed = rollout.pack(device)
    truncated = torch.tensor(rollout.truncated, device=device)
    scores = reward(rollout, records).to(device)
    lengths = torch.tensor([float(len(rollout.response(i))) for i in range(len(prompts))])
    metrics = {
        "objective/scores": float(scores.mean()),
        "response/length": float(lengths.mean()),
        "response/truncated": float(truncated.float().mean()),
        "val/num_eos_tokens": float((~truncated).sum()),
    }
    if cfg.truncation == "penalise":
        scores = torch.where(truncated, cfg.truncation_score, scores)

    def score(part: Packed) -> tuple[Tensor, ...]:
        stats = policy.stats(part, cfg.temperature)
        return stats.logp, stats.entropy, reference.stats(part, cfg.temperature).logp, value.values(part)

    logp, entropy, ref_logp, values = in_parts(packed, cfg.max_tokens, score)
    metrics["rollout/sampler_delta"] = rollout.sampler_delta(packed, logp)
    bootstrap = torch.where(truncated, values[packed.last_rows], 0.0) if cfg.truncation == "bootstrap" else None
    if cfg.truncation == "mask" and bool(truncated.any()):
        kept = (~truncated).nonzero().squeeze(1).tolist()
        if not kept:
            return None, metrics
        packed, rows = packed.select(kept)
        logp, entropy, ref_logp, values = (x[rows] for x in (logp, entropy, ref_logp, values))
        scores = scores[~truncated]
    mask = packed.mask
    rewards, kl = rk.shaped_rewards(scores, logp, ref_logp, packed.cu_seqlens, beta=beta, mask=mask, kl="k1")
    advantages, returns = rk.gae(
        rewards, values, packed.cu_seqlens, gamma=cfg.gamma, lam=cfg.lam, mask=mask, bootstrap=bootstrap
    )
    kept_returns, error = returns[mask], (returns - values)[mask]
    metrics |= {
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": beta,
        "objective/entropy": float(entropy.sum() / len(scores)),
        "objective/rlhf_reward": float((scores - beta * kl).mean()),
        "objective/non_score_reward": float((-beta * kl).mean()),
        "val/explained_var": float(1 - error.var(unbiased=False) / kept_returns.var(unbiased=False).clamp(min=1e-8)),
    }
    experience = Experience(packed, logp, values, rk.whiten(advantages, mask), returns, scores)
    return experience, metrics
