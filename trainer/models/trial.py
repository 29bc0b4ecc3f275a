"""A model is tried before it is trained: its ends exist, and packed sequences are to it what they are alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.data.chat import ends
from trainer.data.packing import Sample, pack

if TYPE_CHECKING:
    from trainer.models.policy import Policy, ScalarModel

TRIED = [[0, 1, 2, 3], [3, 2, 1, 0]]  # sequences that every model is tried on


@contextlib.contextmanager
def tried(model: Any, path: str) -> Iterator[None]:
    """Turns what goes wrong when a model is tried out into one error about it."""
    try:
        yield
    except Exception as error:
        # What our attention refuses arrives as the reason why a forward failed.
        told = next((e for e in (error.__context__, error) if str(e).startswith("model: ")), None)
        fails = f"model: {type(model).__name__} fails on packed sequences: {type(error).__name__}: {error}"
        raise ValueError(f"{told or fails} ({path})") from error


def check_end(model: Any, tokenizer: Any, path: str) -> None:
    """Refuses ends of sequences, which every response gets and the sampler looks for, that the model cannot know."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {path} has no end-of-sequence token, which every response needs")
    rows = model.get_input_embeddings().weight.shape[0]
    suggested = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for last in ends(tokenizer, suggested):
        if not isinstance(last, int) or not 0 <= last < rows:
            name = f" {tokenizer.eos_token!r:.60}" if last == tokenizer.eos_token_id else ""
            token = f"the end-of-sequence token{name} of {path} has the id {last}"
            raise ValueError(
                f"model: {token}, and the embedding has {rows} rows: tokenizer and weights do not belong together"
            )


@torch.no_grad()
def check_apart(seen: Policy | ScalarModel) -> Tensor:
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
def check_policy(policy: Policy) -> None:
    """Tries what would otherwise fail in silence: attention that leaks between sequences, or sees less than it should.

    That the logits are those of a linear head, ``take_apart`` has tried.
    """
    ids = torch.tensor(TRIED, device=policy.model.device)
    theirs = torch.cat([policy.model(input_ids=row[None], use_cache=False).logits[0] for row in ids])
    if not _near(policy.parts.logits(check_apart(policy)), theirs):
        name = type(policy.model).__name__
        raise ValueError(f"model: packed sequences do not give the logits that {name} gives by itself")


def _near(a: Tensor, b: Tensor) -> bool:
    """Row by row, up to a thousandth of its norm: whether the numbers are large or small does not matter."""
    return bool(((a - b).norm(dim=-1) <= 1e-3 * b.norm(dim=-1)).all())
