"""What a frozen reference thinks of the replies: DPO, IPO and KTO hold the policy near it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.packing import Packed, Sample, pack, within_budget
from trainer.models.loading import load_policy
from trainer.models.policy import Policy, frozen
from trainer.training.options import StageConfig
from trainer.training.precision import autocast


class Reference:
    """Log-probabilities under a frozen model: scored once, after which the model is let go, or whenever asked for.

    Args:
        cfg: Token budget and precision.
        model: The reference.
        samples: All replies that will ever be asked for.
        once: Score them now. Costs four bytes per reply token, and saves a forward per step and the model's memory.
    """

    def __init__(self, cfg: StageConfig, model: Policy, samples: Sequence[Sample], *, once: bool) -> None:
        self.cfg, self.model = cfg, None if once else model
        self.known: list[Tensor] = []  # per sample, at its targets
        if not once:
            return
        device = model.weight.device
        for part in within_budget([len(s.tokens) for s in samples], cfg.max_tokens):
            packed = pack([samples[i] for i in part], device)
            logp, mask = self._score(model, packed).cpu(), packed.mask.cpu()
            self.known += [x[m] for x, m in zip(logp.split(packed.lengths), mask.split(packed.lengths), strict=True)]

    def logp(self, indices: Sequence[int], packed: Packed) -> Tensor:
        """[N], zero where there is no target; ``packed`` holds the samples ``indices``, in this order."""
        if self.model is not None:
            return self._score(self.model, packed)
        known, mask = torch.cat([self.known[i] for i in indices]), packed.mask
        return torch.zeros(mask.shape).masked_scatter_(mask.cpu(), known).to(mask.device)

    @torch.no_grad()
    def _score(self, model: Policy, packed: Packed) -> Tensor:
        with autocast(self.cfg, packed.input_ids.device):
            return model.stats(packed).logp


def reference_model(policy: Policy, path: str | None) -> Policy:
    """The model at ``path``, or by default the policy as it is now; it takes no gradients.

    Raises:
        ValueError: Its tokens are not those of the policy, so that its log-probabilities would be of other texts.
    """
    if path is None:
        return frozen(policy)
    model = load_policy(path).to(policy.weight.device).requires_grad_(False)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"reference: want the tokenizer of the policy, {path} has another")
    return model
