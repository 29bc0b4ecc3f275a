"""A value model that is one more head on the policy's backbone: one forward, one backward, one set of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.data.packing import Packed
from trainer.models.policy import Policy, scalar_from


class SharedValue(nn.Module):
    """The head alone, which starts at zero; the backbone stays the policy's.

    Args:
        policy: Gives hidden states, and takes the gradient of the value loss.

    Raises:
        ValueError: The policy has something between its backbone and its head, which a saved value model has not.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        if not policy.parts.plain:
            kind = type(policy.model).__name__
            raise ValueError(f"value_model: got shared, want a model of its own: {kind} has more than a backbone")
        self.head = nn.Linear(policy.weight.shape[1], 1, bias=False, device=policy.weight.device)
        nn.init.zeros_(self.head.weight)
        self.policies = [policy]  # in a list, where torch does not look for weights: these have an owner

    def of(self, hidden: Tensor) -> Tensor:
        """[N] float32, from the policy's hidden states [N, H]."""
        return self.head(hidden).squeeze(-1).float()

    def values(self, packed: Packed) -> Tensor:
        """[N] float32, one per row."""
        return self.of(self.policies[0].hidden(packed))

    @torch.no_grad()
    def save(self, path: Path | str) -> None:
        """Writes a scalar model of its own, with a copy of the backbone."""
        scalar = scalar_from(self.policies[0])
        scalar.head.weight.copy_(self.head.weight)
        scalar.save(path)
