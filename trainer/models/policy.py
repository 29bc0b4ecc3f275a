"""Causal language models seen as a backbone and a head, and the same backbone with a scalar head.

No forward here makes logits: [N, H] hidden states go to the library, which meets the head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import Parts, take_apart
from trainer.data.chat import ends
from trainer.data.packing import Packed
from trainer.data.tokenizer import known
from trainer.models.attention import NAME

disable_progress_bar()  # loading a tiny model is not news, and the stages have a bar of their own

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def positions(config: Any) -> int | None:
    """Tokens of the longest sequence that a configuration has positions for; None where it names none."""
    inner = config.get_text_config()
    found = [getattr(inner, name, None) for name in POSITIONS]
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)


def _inputs(packed: Packed) -> dict[str, Any]:
    """Of a forward over packed sequences."""
    cu, longest = packed.cu_seqlens, max(packed.lengths)
    # use_cache=False and no mask: with either, transformers would attend across sequences.
    return {
        "input_ids": packed.input_ids[None], "position_ids": packed.position_ids[None], "use_cache": False,
        "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


class PackedModel(nn.Module):
    """A model of transformers seen as a backbone and a head of our own business."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        # Dropout would make the policy differ from itself between sampling and training; eval() stays on for good.
        self.model.eval()
        self.model.config.use_cache = False

    @property
    def backbone(self) -> nn.Module:
        return self.model.base_model

    @property
    def limit(self) -> int | None:
        """Tokens of the longest sequence that the model has positions for; None where it does not say."""
        return positions(self.model.config)

    def within(self, max_length: int) -> int:
        """Tokens of a sequence of ``max_length``, as far as the model has positions for them."""
        return min(max_length, self.limit or max_length)

    def save(self, path: Path | str) -> None:
        """Writes safetensors, config.json and the tokenizer, or nothing at all; see ``trainer.models.files.save``."""
        from trainer.models import files  # Whoever trains without writing needs none of it.

        files.save(Path(path), self.model, self.tokenizer)


class Policy(PackedModel):
    """A causal language model of transformers, taken apart into hidden states and a linear head with options.

    Args:
        model: Any that ``rlhf_kernels.integrations.transformers.take_apart`` can take apart (docs/models.md).
        tokenizer: Its own; None for one that is given tokens only.

    Raises:
        ValueError: The model cannot be taken apart.
    """

    tolerance: float | None = None  # of its losses
    parts: Parts
    tokens: int  # ids that exist
    ends: list[int]  # ids at which a response ends

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.parts = take_apart(model)
        self.tokens, self.ends = len(self.parts.weight), []
        if tokenizer is not None:
            self.tokens = min(known(tokenizer), self.tokens)
            self.ends = ends(tokenizer, model.generation_config.eos_token_id)

    @property
    def weight(self) -> Tensor:
        """Weight of the head, [V, H]."""
        return self.parts.weight

    @property
    def head(self) -> dict[str, Any]:
        """The head's options for the library. Rows of its weight beyond the tokens are padding, and no token's."""
        padded = {"vocab_size": self.tokens} if self.tokens < len(self.weight) else {}
        return self.parts.options | padded | ({} if self.tolerance is None else {"tolerance": self.tolerance})

    def states(self, **inputs: Any) -> Tensor:
        """What the head reads, [B, T, H]; ``inputs`` are those of the model's forward."""
        if self.parts.plain:
            return self.parts.backbone(**inputs).last_hidden_state
        return self.parts.hidden_states(**inputs)

    def hidden(self, packed: Packed) -> Tensor:
        """[N, H], aligned with ``packed.targets``."""
        return self.states(**_inputs(packed))[0]

    def stats(self, packed: Packed, temperature: float = 1.0) -> Any:
        """Log-probability and entropy of each target, by the same forward that training uses."""
        return rk.token_stats(self.hidden(packed), self.weight, packed.targets, temperature=temperature, **self.head)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of a few rows, for the sampler. [n, H] to [n, number of tokens]."""
        return self.parts.logits(hidden)[:, : self.tokens]


class ScalarModel(PackedModel):
    """A backbone with one number per token: a reward model reads it at the last token, a value model everywhere.

    On disk it is an ordinary sequence classifier with one label. ``reward_mean`` and ``reward_std`` of its config are
    the statistics of raw scores under the policy that it judges.
    """

    @property
    def head(self) -> nn.Linear:
        prefix = self.model.base_model_prefix + "."
        heads = [m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]
        if len(heads) != 1 or heads[0].out_features != 1:
            raise ValueError(f"model: want one linear head with one output, got {heads}")
        return heads[0]

    def hidden(self, packed: Packed) -> Tensor:
        """Last hidden states, [N, H]."""
        return self.backbone(**_inputs(packed)).last_hidden_state[0]

    def values(self, packed: Packed) -> Tensor:
        """[N] float32, one per row."""
        return self.head(self.hidden(packed)).squeeze(-1).float()

    def raw_scores(self, packed: Packed) -> Tensor:
        """[S] float32, read at the last token of each sequence."""
        return self.head(self.hidden(packed)[packed.last_rows]).squeeze(-1).float()

    def scores(self, packed: Packed) -> Tensor:
        """[S] float32 with mean 0 and standard deviation 1 under the policy of ``set_statistics``."""
        config = self.model.config
        return (self.raw_scores(packed) - getattr(config, "reward_mean", 0.0)) / getattr(config, "reward_std", 1.0)

    @property
    def own(self) -> bool:
        """Whether ``rlhf-train reward`` made it, which reads a score at the last token, the end of the reply."""
        return hasattr(self.model.config, "reward_mean")

    def set_statistics(self, raw: Tensor) -> None:
        """Stores mean and standard deviation of raw scores, [n], that stand for the policy to be judged."""
        self.model.config.reward_mean = float(raw.mean())
        self.model.config.reward_std = max(float(raw.std(unbiased=False)), 1e-6)


def frozen(policy: Policy) -> Policy:
    """A copy that takes no gradients."""
    return copy.deepcopy(policy).requires_grad_(False)


def scalar_from(policy: Policy, generator: torch.Generator | None = None) -> ScalarModel:
    """A scalar model on a copy of the policy's backbone; the head is normal with deviation 1 / sqrt(H + 1)."""
    config = copy.deepcopy(policy.model.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=False, attn_implementation=NAME
        )
    setattr(model, model.base_model_prefix, copy.deepcopy(policy.backbone))
    scalar = ScalarModel(model, policy.tokenizer)
    for name, module in model.named_modules():
        if module is scalar.head:
            fresh = nn.Linear(module.in_features, 1, bias=False)  # on the CPU, where the generator draws
            nn.init.normal_(fresh.weight, std=(module.in_features + 1) ** -0.5, generator=generator)
            setattr(
                model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], fresh.to(policy.weight.device)
            )
            break
    return scalar
