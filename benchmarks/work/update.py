"""A PPO update on a replayed rollout as the trainer makes it, and with a loss that holds all logits.

The losses: `ours`; `materialised`, plain torch over the logits of all tokens; `responses`, the same over those of
response tokens only; `none`, a mean square of the hidden states, which costs nothing: what the others need beyond it
is what they cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk
from trainer.data.packing import Sample, pack
from trainer.models.policy import Policy, scalar_from
from trainer.models.tiny import tiny_policy, word_tokenizer
from trainer.stages.rl.experience import Experience, in_parts
from trainer.stages.rl.method import StepTotals
from trainer.stages.rl.ppo import PPO, PPOConfig
from trainer.training.defaults import decided
from trainer.training.gradients import Terms
from trainer.training.optimizer import Optimizer
from trainer.training.precision import autocast

ENTROPY_ROWS = 256
PolicyLoss = Callable[["World", Experience], rk.LossOutput | Terms]


class Size(NamedTuple):
    """Of the batch and of the model."""

    tokens: int
    length: int  # of each sequence, its prompt included
    prompt: int
    vocab: int
    hidden: int
    layers: int


SIZES = {
    "real": Size(tokens=8192, length=512, prompt=64, vocab=32000, hidden=256, layers=4),
    "small": Size(tokens=1024, length=128, prompt=16, vocab=16384, hidden=64, layers=2),
    "tiny": Size(tokens=256, length=64, prompt=8, vocab=2048, hidden=32, layers=1),
}


class World:
    """Policy, value model, their optimizers, and a rollout whose every response token has a gradient.

    The learning rate is too small to move the policy, so that no ratio reaches the clip and every update is the first.

    Args:
        size: Of the batch, and of the model where none is given.
        policy: Where it is, everything else will be; None makes a small one on the CPU.
        options: Of ``PPOConfig``.
    """

    def __init__(self, size: Size, policy: Policy | None = None, **options: Any) -> None:
        self.size = size
        options = {"lr": 1e-12, "value_lr": 1e-12, "max_tokens": size.tokens} | options
        self.cfg = decided(PPOConfig(data=Path("replayed"), reward="replayed", **options))
        self.method = PPO(self.cfg)
        self.policy = small_policy(size) if policy is None else policy
        self.device = self.policy.weight.device
        self.value = scalar_from(self.policy, torch.Generator().manual_seed(0))
        self.optimizers = [Optimizer(self.cfg, m, 1000) for m in (self.policy, self.value)]
        self.rollout = self._replayed(size.tokens)

    def _replayed(self, tokens: int) -> Experience:
        size, source = self.size, torch.Generator().manual_seed(1)
        ids = torch.randint(2, size.vocab, (tokens // size.length, size.length), generator=source).tolist()
        packed = pack([Sample(row, size.prompt) for row in ids], self.device)
        # In small parts, so that making the batch needs less than learning from it.
        with torch.no_grad(), autocast(self.cfg, self.device):
            logp, values = in_parts(packed, 512, lambda p: (self.policy.stats(p).logp, self.value.values(p)))
        n, mask = len(packed.input_ids), packed.mask

        def noise(scale: float) -> Tensor:
            drawn = torch.randn(n, generator=source).mul(scale).clamp(-2 * scale, 2 * scale)
            return drawn.to(self.device).where(mask, 0.0)

        return Experience(
            packed, old_logp=logp + noise(0.05), ref_logp=logp, entropy=torch.zeros_like(logp),
            scores=logp.new_zeros(len(ids)), truncated=mask.new_zeros(len(ids)), values=values,
            advantages=noise(1.0), returns=values + noise(1.0),
        )  # fmt: skip

    def totals(self, batch: Experience) -> StepTotals:
        return StepTotals(int(batch.packed.mask.sum()), len(batch.scores))

    def update(self, loss: PolicyLoss, batch: Experience | None = None) -> tuple[float, float]:
        """One optimizer step of the policy and one of the value model, as the loop takes them; seconds of each."""
        start = time.perf_counter()
        self.policy_step(loss, batch)
        middle = time.perf_counter()
        self.value_step(batch)
        return middle - start, time.perf_counter() - middle

    def policy_step(self, loss: PolicyLoss, batch: Experience | None = None) -> None:
        """The first half of an update."""
        self._step(self.optimizers[0], lambda part: loss(self, part), batch)

    def value_step(self, batch: Experience | None = None) -> None:
        """The other half."""
        totals = self.totals(self.rollout if batch is None else batch)
        self._step(self.optimizers[1], lambda part: self.method.value_loss(self.value, part, totals), batch)

    def _step(
        self, optimizer: Optimizer, loss: Callable[[Experience], rk.LossOutput | Terms], batch: Experience | None
    ) -> None:
        batch = self.rollout if batch is None else batch
        parts = batch.parts(range(len(batch.scores)), self.cfg.max_tokens)

        def under_autocast(part: Experience) -> rk.LossOutput | Terms:
            with autocast(self.cfg, self.device):
                return loss(part)

        optimizer.step(parts, under_autocast, [int(p.packed.mask.sum()) for p in parts])

    def gradient(self, loss: PolicyLoss) -> tuple[float, Tensor]:
        """Loss and the policy's gradient, in a row."""
        out = loss(self, self.rollout)
        out.loss.backward()
        flat = torch.cat([p.grad.flatten() for p in self.policy.parameters() if p.grad is not None])
        self.policy.zero_grad()
        return float(out.loss.detach()), flat


def small_policy(size: Size) -> Policy:
    """Of random weights, on the CPU."""
    words = [f"w{i}" for i in range(size.vocab - 2)]
    return tiny_policy(word_tokenizer(words), 0, hidden=size.hidden, layers=size.layers)


def ours(world: World, part: Experience) -> Terms:
    """What the trainer does."""
    return world.method.policy_loss(world.policy, part, world.totals(world.rollout), 0.0)


def materialised(world: World, part: Experience) -> rk.LossOutput:
    """The same loss and metrics in plain torch: one log-softmax is all that backward remembers."""
    mask = part.packed.mask
    logp_all = world.policy.logits(world.policy.hidden(part.packed)).log_softmax(-1)
    logp = logp_all.gather(1, part.packed.targets.where(mask, 0)[:, None]).squeeze(1)
    return _clipped(world, part, logp[mask], _entropy(logp_all)[mask])


def responses(world: World, part: Experience) -> rk.LossOutput:
    """As lean as that gets: prompts never meet the head."""
    mask = part.packed.mask
    logp_all = world.policy.logits(world.policy.hidden(part.packed)[mask]).log_softmax(-1)
    logp = logp_all.gather(1, part.packed.targets[mask][:, None]).squeeze(1)
    return _clipped(world, part, logp, _entropy(logp_all))


@torch.no_grad()
def _entropy(logp_all: Tensor) -> Tensor:
    """A metric, and therefore taken in small parts."""
    return torch.cat([-(x.exp() * x).sum(-1) for x in logp_all.split(ENTROPY_ROWS)])


def _clipped(world: World, part: Experience, logp: Tensor, entropy: Tensor) -> rk.LossOutput:
    cfg, mask = world.cfg, part.packed.mask
    assert part.advantages is not None
    log_ratio, advantages = logp - part.old_logp[mask], part.advantages[mask]
    ratio = log_ratio.exp()
    low, high = 1 - cfg.clip[0], 1 + cfg.clip[1]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    with torch.no_grad():
        clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        metrics = {
            "approx_kl": (ratio - 1 - log_ratio).mean(), "clipfrac": clipped.float().mean(), "ratio": ratio.mean(),
            "entropy": entropy.mean(),
        }  # fmt: skip
    return rk.LossOutput(loss.sum() / world.totals(world.rollout).tokens, metrics)


def none(world: World, part: Experience) -> rk.LossOutput:
    """No head at all."""
    return rk.LossOutput(world.policy.hidden(part.packed).square().mean(), {})


LOSSES: dict[str, PolicyLoss] = {"ours": ours, "materialised": materialised, "responses": responses, "none": none}
