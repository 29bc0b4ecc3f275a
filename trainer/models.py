"""Causal language models seen as a backbone and a head, and the same backbone with a scalar head.

No forward here makes logits: [N, H] hidden states go to the library, which meets the head.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import Parts, take_apart
from trainer import model_files
from trainer.attention import NAME
from trainer.packing import Packed, Sample, pack

TRIED = [[0, 1, 2, 3], [3, 2, 1, 0]]  # sequences that every model is tried on

disable_progress_bar()  # loading a tiny model is not news, and the stages have a bar of their own


def _inputs(packed: Packed) -> dict[str, Any]:
    """Of a forward over packed sequences."""
    cu, longest = packed.cu_seqlens, max(packed.lengths)
    # use_cache=False and no mask: with either, transformers would attend across sequences.
    return {
        "input_ids": packed.input_ids[None], "position_ids": packed.position_ids[None], "use_cache": False,
        "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


class Seen(nn.Module):
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

    def save(self, path: Path | str) -> None:
        """Writes safetensors, config.json and the tokenizer, or nothing at all; see ``model_files.save``."""
        model_files.save(Path(path), self.model, self.tokenizer)


class Policy(Seen):
    """A causal language model of transformers, taken apart into hidden states and a linear head with options.

    Args:
        model: Any that ``rlhf_kernels.integrations.transformers.take_apart`` can take apart (docs/models.md).
        tokenizer: Its own.

    Raises:
        ValueError: The model cannot be taken apart.
    """

    tolerance: float | None = None  # of its losses
    parts: Parts

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.parts = take_apart(model)

    @property
    def weight(self) -> Tensor:
        """Weight of the head, [V, H]."""
        return self.parts.weight

    @property
    def head(self) -> dict[str, Any]:
        """The head's options for the library."""
        return self.parts.options | ({} if self.tolerance is None else {"tolerance": self.tolerance})

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
        """Float32 logits of a few rows, for the sampler. [n, H] to [n, V]."""
        return self.parts.logits(hidden)


class ScalarModel(Seen):
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

    def set_statistics(self, raw: Tensor) -> None:
        """Stores mean and standard deviation of raw scores, [n], that stand for the policy to be judged."""
        self.model.config.reward_mean = float(raw.mean())
        self.model.config.reward_std = max(float(raw.std(unbiased=False)), 1e-6)


def resolve(path: str) -> str:
    """A run folder stands for the model in it; anything else for itself."""
    inside = Path(path) / "model"
    return str(inside) if (inside / "config.json").exists() else path


def load_policy(path: str) -> Policy:
    """A local directory or hub id. Weights in float32; the code of a model is never run.

    Raises:
        ValueError: If the model is not whole (``model_files.load``) or cannot be taken apart into hidden states and a
            linear head, the tokenizer has no end of sequence, or packed sequences do not give the logits that they
            give alone.
    """
    path = resolve(path)
    model, tokenizer = model_files.load(AutoModelForCausalLM, path), model_files.tokenizer_of(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {path} has no end-of-sequence token, which every response needs")
    _check_end(model, tokenizer, path)
    with _tried(model, path):
        policy = Policy(model, tokenizer)
        _check(policy)
    return policy


def load_scalar(path: str, generator: torch.Generator | None = None) -> ScalarModel:
    """A saved reward or value model, or a new one on the backbone of a causal language model at ``path``.

    Args:
        path: A local directory or hub id.
        generator: Draws the head of a new one; None is for who wants a model that has learnt to judge.

    Raises:
        ValueError: If it has no head of one number and ``generator`` is None, packed sequences are not kept apart, or
            what ``load_policy`` raises.
    """
    path = resolve(path)
    kinds = model_files.config_of(path).architectures or []
    if not any("SequenceClassification" in kind for kind in kinds):
        if generator is None:
            raise ValueError(
                f"model: {path} is {kinds[0] if kinds else 'a model of no known kind'} and has no head that scores, "
                "want a reward model; `rlhf-train reward` makes one of it"
            )
        return scalar_from(load_policy(path), generator)
    model = model_files.load(AutoModelForSequenceClassification, path)
    scalar = ScalarModel(model, model_files.tokenizer_of(path))
    _check_end(model, scalar.tokenizer, path)
    with _tried(model, path):
        _check_apart(scalar)
        scalar.head  # noqa: B018  there is one, and it gives one number
    return scalar


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


def frozen(policy: Policy) -> Policy:
    """A copy that takes no gradients."""
    return copy.deepcopy(policy).requires_grad_(False)


@contextlib.contextmanager
def _tried(model: Any, path: str) -> Iterator[None]:
    """Turns what goes wrong when a model is tried out into one error about it."""
    try:
        yield
    except Exception as error:
        # What our attention refuses arrives as the reason why a forward failed.
        told = next((e for e in (error.__context__, error) if str(e).startswith("model: ")), None)
        fails = f"model: {type(model).__name__} fails on packed sequences: {type(error).__name__}: {error}"
        raise ValueError(f"{told or fails} ({path})") from error


def _check_end(model: Any, tokenizer: Any, path: str) -> None:
    """Refuses a tokenizer whose end of sequence, which every response gets, the model has never heard of."""
    rows, last = model.get_input_embeddings().weight.shape[0], tokenizer.eos_token_id
    if last is not None and last >= rows:
        token = f"the end-of-sequence token {tokenizer.eos_token!r:.60} of {path} has the id {last}"
        raise ValueError(
            f"model: {token}, and the embedding has {rows} rows: tokenizer and weights do not belong together"
        )


@torch.no_grad()
def _check_apart(seen: Policy | ScalarModel) -> Tensor:
    """Refuses a model whose sequences see their neighbours.

    One that sees its neighbour has a gradient there, however small the weights are; in one that does not, it is zero to
    the bit. Hidden states may change with the tokens beside them, for experts multiply the rows of all sequences at
    once, and rounding depends on how many these are. A change beyond that is a leak without a gradient.

    Returns:
        Hidden states of ``TRIED``, end to end.
    """
    (first, second), other, device = TRIED, [1, 3, 3, 1], seen.model.device
    embedded: list[Tensor] = []

    def leaf(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale it in place

    def hidden(*tokens: list[int]) -> Tensor:
        return seen.hidden(pack([Sample(t, 1) for t in tokens], device))

    with seen.model.get_input_embeddings().register_forward_hook(leaf), torch.enable_grad():
        together = hidden(first, second)
    front, back = slice(0, 4), slice(4, 8)
    for own, beside, changed in ((front, back, (first, other)), (back, front, (other, second))):
        pull = torch.linspace(-1, 1, together.numel(), device=device).view_as(together).clone()
        pull[beside] = 0  # and not the same everywhere else: a layer norm keeps its sum
        gradients = torch.autograd.grad(together, embedded, pull, retain_graph=True)
        if any(g[0, beside].any() for g in gradients) or not _near(hidden(*changed)[own], together[own]):
            name = type(seen.model).__name__
            raise ValueError(f"model: the attention of {name} does not keep packed sequences apart")
    return together.detach()


@torch.no_grad()
def _check(policy: Policy) -> None:
    """Tries what would otherwise fail in silence: attention that leaks between sequences, or sees less than it should.

    That the logits are those of a linear head, ``take_apart`` has tried.
    """
    ids = torch.tensor(TRIED, device=policy.model.device)
    theirs = torch.cat([policy.model(input_ids=row[None], use_cache=False).logits[0] for row in ids])
    if not _near(policy.logits(_check_apart(policy)), theirs):
        name = type(policy.model).__name__
        raise ValueError(f"model: packed sequences do not give the logits that {name} gives by itself")


def _near(a: Tensor, b: Tensor) -> bool:
    """Row by row, up to a thousandth of its norm: whether the numbers are large or small does not matter."""
    return bool(((a - b).norm(dim=-1) <= 1e-3 * b.norm(dim=-1)).all())
