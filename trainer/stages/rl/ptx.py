"""Text that the policy should not forget, mixed into every update: PPO-ptx.

Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2: gradients of the language-model loss are added to
those of the policy loss, which undoes most of the alignment tax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

import rlhf_kernels as rk
from trainer.data import reading as data
from trainer.data.encoding import encode_pairs
from trainer.data.packing import Packed, pack, within_budget
from trainer.models.policy import Policy
from trainer.models.rendering import render_as
from trainer.training.gradients import Terms

if TYPE_CHECKING:
    from trainer.stages.rl.options import RLConfig


class PtxTexts:
    """The texts, and their share of one optimizer step.

    Args:
        cfg: Names the file, the coefficient and the token budget.
        policy: Its tokenizer encodes the texts.
        note: Receives messages about the data.
    """

    def __init__(self, cfg: RLConfig, policy: Policy, note: Callable[[str], None]) -> None:
        assert cfg.ptx_data is not None
        self.coef, self.max_tokens = cfg.ptx_coef, cfg.max_tokens
        records = data.read(cfg.ptx_data, "demonstrations", render=render_as(cfg), note=note)
        prompts, responses = [r["prompt"] for r in records], [r["response"] for r in records]
        self.samples = encode_pairs(policy.tokenizer, prompts, responses, cfg.max_length, note=note)

    def packs(self, indices: Sequence[int], device: torch.device) -> list[Packed]:
        """The chosen texts as micro-batches."""
        chosen = [self.samples[i] for i in indices]
        parts = within_budget([len(s.tokens) for s in chosen], self.max_tokens)
        return [pack([chosen[i] for i in part], device) for part in parts]

    def loss(self, policy: Policy, packed: Packed, num_tokens: int) -> Terms:
        """Mean negative log-probability of response tokens, under the ``num_tokens`` of the whole step."""
        out = rk.sft_loss(policy.hidden(packed), policy.weight, packed.targets, num_tokens=num_tokens, **policy.head)
        return Terms({"ptx": (self.coef, out.loss)}, {})
