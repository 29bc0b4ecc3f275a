"""A model of transformers, taken apart into what the losses need. For transformers>=5.17,<6.

``take_apart(model)`` finds the head, reads from the model's config what happens to logits after it, and verifies both
on a few tokens. A model whose logits cannot be rebuilt from the parts is refused by name.

    parts = take_apart(model)                                   # once
    hidden = parts.hidden_states(input_ids=ids)                 # [B, T, H], no logits
    rk.sft_loss(hidden, parts.weight, targets, **parts.options).loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.integrations.heads import bias_of, check_linear, linear, refuse, unwrap, weight_of
from rlhf_kernels.integrations.versions import require

# One name means several things (Granite divides logits by logits_scaling, HyperCLOVA X multiplies, MiniCPM3 divides the
# hidden states), so a config only proposes: each number, its inverse and one are tried on the model.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Parts:
    """A model as the losses see it: hidden states, a weight, and options. Holds no copy of anything.

    Attributes:
        model: what was given; ``hidden_states`` calls it, with its wrappers and hooks.
        backbone: what transformers calls the base model.
        head: the linear layer at the end, perhaps wrapped by PEFT.
        plain: ``backbone(...).last_hidden_state`` is what the head reads, bit for bit, so the backbone may be called
            alone. Elsewhere something lies between them (a transform, a projection, a scale).
        scores: the head gives one number per token, not logits.
        constants: ``softcap``, ``logit_scale`` and ``vocab_size``, where they are not the default.
    """

    model: Any
    backbone: nn.Module
    head: nn.Module
    plain: bool
    scores: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """[V, H] of the head as it is now; with LoRA on the head W + scaling B A, differentiable in A and B.

        Ask anew in every step: an adapter may have been trained or switched off since.
        """
        return weight_of(self.head)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for every function that meets the head: ``bias`` as it is now, and ``constants``."""
        bias = bias_of(self.head)
        return ({} if bias is None else {"bias": bias}) | dict(self.constants)

    def hidden_states(self, *args: Any, **inputs: Any) -> Tensor:
        """What the head reads, one row per input token. Nothing of the size of logits is made.

        The model runs as usual, mode, adapters and hooks included, until the head, which is given no rows.

        Args:
            *args: of the model's forward.
            **inputs: of the model's forward: ``input_ids``, ``attention_mask`` and so on, but neither ``labels`` nor
                ``logits_to_keep``.

        Returns:
            [B, T, H], in the dtype of the head. Row t predicts token t + 1.

        Raises:
            ValueError: ``labels`` or ``logits_to_keep`` were given.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rlhf_kernels.integrations.transformers import take_apart
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> parts = take_apart(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)))
        >>> parts.hidden_states(input_ids=torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
        """
        for name in ("labels", "logits_to_keep"):
            if inputs.get(name) is not None:
                raise ValueError(f"{name}: got one, wants none: every row is given back, and the loss comes after")
        seen: list[Tensor] = []

        def starve(_module: nn.Module, given: tuple) -> tuple:
            seen.append(given[0])
            # The head still runs, so that hooks of wrappers stay in step. Scores are small, and pooled by position.
            return given if self.scores else (given[0][:, :0], *given[1:])

        with _hooked(self.head.register_forward_pre_hook(starve)):
            self.model(*args, **inputs)
        if not seen:
            refuse(unwrap(self.model), "its head was not called; take it apart anew")
        return seen[-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model would make of these rows. For samplers, values and tests, where rows are few.

        Args:
            hidden: [..., H].

        Returns:
            [..., V], float32 unless the head is float64.
        """
        return _post(linear(hidden, self.head).to(torch.promote_types(hidden.dtype, torch.float32)), **self.constants)


def take_apart(model: Any, inputs: Mapping[str, Any] | None = None) -> Parts:
    """Backbone, head and head options of a causal language model, or of a model that scores every token.

    Takes any model of transformers whose last step is linear: tied or not, with bias, softcap, logit scale or padded
    vocabulary; ``...ForSequenceClassification`` and ``...ForTokenClassification`` with one label, whose ``weight`` is
    [1, H]; the same under PEFT, with adapters in the backbone, LoRA on the head or the head in ``modules_to_save``; the
    same with a quantised backbone. Two forwards of a few tokens, in eval mode, prove what is said of the head.

    Args:
        model: a model of transformers, bare or wrapped by PEFT or DDP; before FSDP2 shards it.
        inputs: what to try it on, for a model that wants more than ``input_ids``; the latter [B, T] are needed.

    Returns:
        The parts. They stay valid while the model trains and adapters are switched; take apart anew after replacing
        the head or its options.

    Raises:
        ImportError: transformers is missing, or its version is outside the range above.
        ValueError: the model is of a kind that cannot be taken apart, by name and with the reason.

    >>> from transformers import CohereConfig, CohereForCausalLM
    >>> from rlhf_kernels.integrations.transformers import take_apart
    >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = CohereForCausalLM(CohereConfig(vocab_size=50, logit_scale=0.25, **sizes, eos_token_id=1))
    >>> parts, ids = take_apart(model), torch.tensor([[5, 6, 7, 8]])
    >>> parts.options
    {'logit_scale': 0.25}
    >>> hidden = parts.hidden_states(input_ids=ids)[:, :-1]
    >>> rk.sft_loss(hidden, parts.weight, ids[:, 1:], **parts.options).loss.requires_grad
    True
    """
    require("transformers", "5.17", "6")
    bare = unwrap(model)
    if not hasattr(bare, "config") or not hasattr(bare, "get_output_embeddings"):
        raise TypeError(f"model: got {type(model).__name__}, wants a model of transformers")
    head = bare.get_output_embeddings()
    scores = head is None
    if scores:
        head = _score_head(bare)
    check_linear(bare, head)
    given = dict(inputs) if inputs else {"input_ids": _tokens(bare.config, 1 if scores else 2, head)}
    if not isinstance(given.get("input_ids"), Tensor):
        raise ValueError(f"inputs: got {sorted(given)}, wants input_ids [B, T] among them")
    with _at_rest(model), torch.no_grad():
        parts, hidden = _probe(model, bare, head, given, scores)
        try:
            again = parts.hidden_states(**given)
        except Exception as error:
            refuse(bare, f"it fails when its head is given no rows: {type(error).__name__}: {error}")
        if again.shape != hidden.shape or not _near(again, hidden, 64):
            refuse(bare, "two forwards of the same tokens give different hidden states")
    return parts


def _probe(model: Any, bare: Any, head: nn.Module, inputs: dict, scores: bool) -> tuple[Parts, Tensor]:
    """One forward in which the head's answer is replaced by known numbers: what becomes of them is what follows it."""
    read: list[Tensor] = []
    said: list[Tensor] = []
    ends: dict[nn.Module, Any] = {}

    def answer(_module: nn.Module, given: tuple, output: Tensor) -> Tensor:
        read.append(given[0])
        said.append(output)
        return _known(output)

    def end(module: nn.Module, _given: tuple, output: Any) -> None:
        ends[module] = getattr(output, "last_hidden_state", None)

    backbones = [m for m in _backbones(bare) if m is not head]
    with _hooked(head.register_forward_hook(answer), *(m.register_forward_hook(end) for m in backbones)):
        try:
            out = model(**inputs)
        except Exception as error:
            refuse(bare, f"it fails on a few tokens (give others as inputs=): {type(error).__name__}: {error}")
    if len(read) != 1:
        refuse(bare, f"its head is called {len(read)} times in a forward, wants one")
    hidden, shape = read[0], tuple(inputs["input_ids"].shape)
    if tuple(hidden.shape[:-1]) != shape:
        refuse(bare, f"its head reads {list(hidden.shape)}, wants a row for each of {list(shape)} tokens")
    if hidden.dtype != weight_of(head).dtype:
        refuse(
            bare, f"its head has {weight_of(head).dtype} and reads {hidden.dtype}; under autocast, call this outside"
        )
    if said[0].shape[-1] != weight_of(head).shape[0] or not _near(said[0], linear(hidden, head), 8):
        refuse(bare, "its head says something else than hidden @ weight.T + bias")
    constants = _what_follows(bare, _known(said[0]), out.logits if hasattr(out, "logits") else out[0], scores)
    same = [m for m in backbones if isinstance(ends.get(m), Tensor) and torch.equal(ends[m], hidden)]
    backbone = (same + backbones + [bare])[0]
    return Parts(model, backbone, head, bool(same), scores, constants), hidden


def _what_follows(bare: Any, said: Tensor, logits: Tensor, scores: bool) -> dict[str, Any]:
    """The options that turn what the head said into the logits."""
    if scores and logits.dim() == 2:
        said = said[:, -1]  # a sequence's score is that of its last token
    if logits.shape[:-1] != said.shape[:-1] or logits.shape[-1] > said.shape[-1]:
        refuse(bare, f"its logits are {list(logits.shape)}, wants {list(said.shape)}")
    narrow = {"vocab_size": logits.shape[-1]} if logits.shape[-1] < said.shape[-1] else {}
    for constants in _candidates(bare.config):
        if _near(_post(said, **constants, **narrow), logits, 8, elementwise=True):
            return constants | narrow
    refuse(bare, "its logits are not softcap(scale * (hidden @ weight.T + bias)) with numbers from its config")


def _known(like: Tensor) -> Tensor:
    """Numbers from -1000 to 1000, each another, most of them small: no cap, scale, mask or shuffle escapes them."""
    steps = torch.linspace(-1, 1, like.numel(), device=like.device, dtype=torch.float64)
    return (1000 * steps**3).to(torch.promote_types(like.dtype, torch.float32)).view(like.shape)


def _backbones(model: Any) -> list[nn.Module]:
    """Where a backbone may be, by the names that models have for it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = (model.base_model, decoder, getattr(model, "model", None))
    return list(dict.fromkeys(m for m in found if isinstance(m, nn.Module) and m is not model))


def _candidates(config: Any) -> Iterator[dict[str, Any]]:
    """Options that the numbers in a config may stand for, the plain ones first."""
    configs = (config, config.get_text_config())
    numbers = [{getattr(c, n, None) for c in configs for n in names} for names in (SCALES, CAPS)]
    found = [sorted(x for x in xs if isinstance(x, (int, float)) and x > 0) for xs in numbers]
    scales = [1.0, *(y for x in found[0] for y in (x, 1 / x) if x != 1)]
    for cap, scale in product((None, *found[1]), scales):
        yield ({"softcap": cap} if cap else {}) | ({"logit_scale": scale} if scale != 1 else {})


def _post(z: Tensor, softcap: float | None = None, logit_scale: float = 1.0, vocab_size: int | None = None) -> Tensor:
    z = logit_scale * z[..., :vocab_size]
    return softcap * torch.tanh(z / softcap) if softcap else z


def _near(a: Tensor, b: Tensor, ulps: int, elementwise: bool = False) -> bool:
    """Equal up to rounding in the coarser dtype: in relative L2, or each number for itself."""
    eps = ulps * max(torch.finfo(x.dtype).eps for x in (a, b))
    a, b = a.double(), b.double()
    if elementwise:
        return torch.allclose(a, b, rtol=eps, atol=eps * 1e-3)
    return bool((a - b).norm() <= eps * b.norm())


def _score_head(model: Any) -> nn.Module:
    """The one layer behind the backbone that gives one number."""
    inside = set(model.base_model.modules()) if model.base_model is not model else set()
    ends = [m for m in model.modules() if m not in inside and getattr(m, "out_features", None) == 1]
    ends = [m for m in ends if not any(m is not n and m in set(n.modules()) for n in ends)]  # PEFT's, not what it wraps
    if len(ends) != 1:
        refuse(model, f"it has no output embeddings and {len(ends)} layers with one output behind its backbone")
    return ends[0]


def _tokens(config: Any, batch: int, head: nn.Module) -> Tensor:
    """[batch, 8] ordinary tokens: those that a config gives a name may mean an image, padding or an end."""
    text = config.get_text_config()
    named = {v for c in (config, text) for k, v in c.to_dict().items() if "token" in k and isinstance(v, int)}
    ordinary = [i for i in range(2, getattr(text, "vocab_size", 64)) if i not in named][: 8 * batch] or [0]
    ids = [ordinary[i % len(ordinary)] for i in range(8 * batch)]
    return torch.tensor(ids, device=weight_of(head).device).view(batch, 8)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode, and then every module as it was."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _hooked(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
