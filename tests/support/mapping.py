"""The calls in the tables of docs/coming_from.md, read from the page, and a batch to try them on."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
B, T, H, V, K = 6, 9, 12, 40, 3
CALL = re.compile(r"`([a-z_]+\(.*\)(?: / num_tokens)?)`")
SAME_GRADIENT = "same gradient"


def rows() -> dict[tuple[str, str], tuple[str, str]]:
    """(section, what others call it) -> (call, what differs), of all tables with a column "here"."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    section, head = "", []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif not set(line) <= set("|- ") and head[-1] == "differs":
            assert len(cells) == len(head), line
            if call := CALL.fullmatch(cells[1]):
                found[section, cells[0].replace("`", "")] = call[1], cells[-1]
    return found


def world() -> dict[str, Any]:
    """Names that the calls use: a padded batch [B, T] in float64 whose prompts and padding are no targets."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64) * scale

    hidden, weight = normal(B, T, H), normal(V, H, scale=0.3)
    first, last = torch.tensor([2, 0, 3, 1, 4, 2]), torch.tensor([7, 9, 8, 9, 6, 5])
    place = torch.arange(T)
    mask = (place >= first[:, None]) & (place < last[:, None])
    targets = torch.randint(V, (B, T), generator=draw).where(mask, -100)
    names: dict[str, Any] = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets}
    names |= {"ref_hidden": normal(B, T, H), "ref_weight": normal(V, H, scale=0.3), "mask": mask}
    with torch.no_grad():
        logp = logps(names)
        ref = logps(names | {"hidden": names["ref_hidden"], "weight": names["ref_weight"]})
    names |= {"old_logp": logp + normal(B, T, scale=0.8), "ref_logp": ref, "advantages": normal(B)}
    names |= {
        "cu_seqlens": torch.arange(B + 1) * T,
        "B": B,
        "K": K,
        "lo": 0.2,
        "hi": 0.28,
        "delta": 1.5,
        "eps_max": 1.2,
    }
    names |= {"num_items": 50.0, "num_tokens": mask.sum(), "max_completion_length": 8, "horizon": T, "beta": 0.1}
    names |= {"gamma": 0.5, "lam": 0.9, "kl": 0.3, "z": 1e-2, "margin": 0.2, "w": 0.5}
    names |= {"desirable": torch.tensor([True, False, True, True, False, False]), "scores": normal(B)}
    names |= {"values": normal(B, T), "returns": normal(B, T), "old_values": normal(B, T)}
    return names | {"rewards": normal(B, T).where(mask, 0.0)} | objectives()


def objectives() -> dict[str, Callable]:
    """The objectives that the page shows, with the denominators of this batch in place of the page's."""
    names: dict[str, Any] = {"torch": torch}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text(encoding="utf-8")):
        if example.source.startswith(("def sapo", "def dft", "def apo_zero")):
            exec(example.source, names)
    names["pairs"] = B // 2
    return {name: names[name] for name in ("sapo", "dft", "apo_zero")} | {"set_tokens": lambda n: names.update(N=n)}


def logps(names: dict[str, Any]) -> Tensor:
    """[B, T] in plain torch, zero where there is no target."""
    z = (names["hidden"] @ names["weight"].T).log_softmax(-1)
    targets = names["targets"]
    return z.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets != -100, 0.0)


def by_pairs(names: dict[str, Any]) -> dict[str, Any]:
    """The same batch as TRL and Liger have it becomes ours: chosen and rejected halves are interleaved."""
    order = torch.arange(B).view(2, B // 2).T.reshape(-1)
    there = ("hidden", "targets", "ref_logp", "ref_hidden", "old_logp", "mask", "scores")
    return names | {name: names[name][order] for name in there}


def ours(call: str, names: dict[str, Any], **given: Any) -> Any:
    """What a call of the page returns; positional arguments that it leaves out are those of their names."""
    parsed = ast.parse(call, mode="eval").body
    names = names | given
    if not isinstance(parsed, ast.Call):  # a sum of per-token divergences
        return eval(call, {"kl_divergence": rk.kl_divergence}, names)
    assert isinstance(parsed.func, ast.Name)
    function = getattr(rk, parsed.func.id)
    options = {k.arg: eval(ast.unparse(k.value), {}, names) for k in parsed.keywords}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            options.setdefault(parameter.name, names.get(parameter.name))
    takes_boundaries = function in (rk.ppo_loss, rk.grpo_loss)
    return function(**({"cu_seqlens": names["cu_seqlens"]} if takes_boundaries else {}), **options)
