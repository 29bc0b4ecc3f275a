"""What a random call is made of: dice, tensors in any layout, and the call itself."""

from __future__ import annotations

import functools
import inspect
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

HALF = (torch.bfloat16, torch.float16)
MISSING = object()  # in the place of an argument that is not given
NAN, INF = float("nan"), float("inf")


class Dice:
    """All chance of one call, from its seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *of: Any) -> Any:
        return self.random.choice(of)

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.torch, dtype=torch.float64).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.torch, dtype=torch.float64).to(dtype)

    def ids(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.torch)

    def yes(self, p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch) < p

    def floats(self) -> torch.dtype:
        """Of whatever is neither hidden nor weight."""
        return self.pick(torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Parameter(NamedTuple):
    default: Any  # MISSING where there is none
    may_be_none: bool


DEFAULTS = {
    "temperature": 1.0,
    "logit_scale": 1.0,
    "ignore_index": -100,
    "backend": "auto",
    "loss_scale": 1.0,
    "checks": True,
}


@functools.cache
def parameters(function: str) -> dict[str, Parameter]:
    """What a public function takes, the options of the head with it."""
    found, rest = {}, {}
    for p in inspect.signature(getattr(rk, function)).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            rest = rk.HeadOptions.__annotations__
        else:
            default = MISSING if p.default is p.empty else p.default
            found[p.name] = Parameter(default, "None" in str(p.annotation) or p.default is None)
    head = {name: Parameter(DEFAULTS.get(name), name not in DEFAULTS) for name in rest}
    return found | head


@dataclass
class Change:
    """One argument made bad, or perhaps only odd."""

    name: str
    what: str
    verdict: str  # "must" be refused; "may" be refused, else the oracle is right; "never" matters
    also: tuple[str, ...] = ()  # other arguments that an error may name: what was changed is right by itself


@dataclass
class Case:
    """One call. ``plain`` holds the arguments as the oracle reads them, ``given`` as the library gets them."""

    seed: int
    function: str
    plain: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    busy: dict[str, Tensor] = field(default_factory=dict)  # by argument: entries that count for sure
    idle: dict[str, Tensor] = field(default_factory=dict)  # by argument: entries that never matter
    wanted: tuple[str, ...] = ()  # arguments with a gradient
    mode: str = "grad"  # or "no_grad" or "inference"
    autocast: torch.dtype | None = None
    positional: int = 0  # how many arguments are given by position
    changes: list[Change] = field(default_factory=list)

    @property
    def checks(self) -> bool:
        return self.says("checks", True)

    def says(self, flag: str, default: bool) -> bool:
        try:
            return bool(self.plain.get(flag, default))
        except (ValueError, RuntimeError, TypeError):  # nothing that is true or false
            return default

    def counts(self, name: str, busy: Tensor, idle: Tensor | None = None) -> None:
        self.busy[name] = busy
        self.idle[name] = ~busy if idle is None else idle


def strided(d: Dice, x: Tensor) -> Tensor:
    """The same values somewhere else in memory: transposed, with gaps, or not at the start."""
    if x.numel() == 0:
        return x.clone()
    way = d.pick("same", "gaps", "offset", "transposed", "middle", "expanded")
    if way == "expanded" and x.dim() and len(x) > 1 and bool((x == x[:1]).all()):
        return x[:1].expand(x.shape)
    if way == "gaps":
        return torch.stack([x, x], -1)[..., 0]
    if way == "offset":  # not aligned to anything
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)
    if way == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "middle" and x.dim() > 0:
        return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    return x.clone()


def poisoned(d: Dice, x: Tensor, idle: Tensor) -> Tensor:
    """Entries that never matter hold rubbish."""
    value = d.pick(NAN, INF, -INF, torch.finfo(x.dtype).max)
    return x.masked_fill(idle, value)


def dress(d: Dice, case: Case, rubbish: bool) -> None:
    """``given`` from ``plain``: any layout, rubbish where it cannot matter, leaves where a gradient is wanted."""

    def dressed(name: str, x: Any) -> Any:
        if isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) for y in x):
            return type(x)(dressed(f"{name}[{i}]", y) for i, y in enumerate(x))
        if isinstance(x, dict):
            return {key: dressed(f"{name}.{key}", y) for key, y in x.items()}
        if not isinstance(x, Tensor):
            return x
        idle = case.idle.get(name)
        if rubbish and idle is not None and x.is_floating_point():
            x = poisoned(d, x, idle)
        own = name == "logits" and case.plain.get("overwrite")  # must be contiguous
        x = x.clone() if own or d.chance(0.5) else strided(d, x.clone())
        return x.requires_grad_() if name in case.wanted else x

    case.given = {name: dressed(name, x) for name, x in case.plain.items()}


def factors(d: Dice, n: int) -> tuple[int, ...]:
    """Leading dimensions for n rows."""
    shapes: list[tuple[int, ...]] = [(n,)] * 4 + [(1, n), (n, 1)]
    shapes += [(a, n // a) for a in range(2, n) if n % a == 0]
    if n == 1:
        shapes += [()]
    if n == 0:
        shapes += [(0, 3), (2, 0)]
    return d.pick(*shapes)


def count(d: Dice, least: int) -> Any:
    """A denominator in any form that it may have."""
    value = d.pick(0, max(least, 1), least + 5, least + 0.5, 2 * least + 1)
    form = d.pick("none", "none", "number", "number", "tensor")
    if form == "none":
        return None
    if form == "number":
        return value
    whole = (torch.int64, torch.int32, torch.uint8) if value == int(value) else ()
    return torch.tensor(value, dtype=d.pick(torch.float32, torch.float64, torch.bfloat16, torch.float16, *whole))


def unused(case: Case, name: str) -> bool:
    """Nobody reads it in this call, so that it may be anything."""
    if name == "loss_scale":
        return case.plain.get("weight_grad") is None
    if case.function in ("orpo_loss", "kto_loss"):
        return False
    kind = case.plain.get("reduction", "token_mean")
    by_token = isinstance(kind, str) and kind == "token_mean"
    bounds = name == "cu_seqlens" and case.function in ("sft_loss", "value_loss") and by_token
    return bounds or (name == "num_tokens" and not by_token) or (name == "num_sequences" and by_token)
