"""Break one or two arguments of a valid call, or make them odd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import tensors, values
from tests.fuzz.draw import MISSING, Case, Change, Dice, parameters

FLAGS = ("length_normalize", "whiten", "shift_mean", "overwrite", "checks")
STRUCTURE = (  # arguments that say which entries of others count
    "targets", "token_ids", "ignore_index", "vocab_size", "mask", "checks", "cu_seqlens", "groups", "ranks", "positive",
    "clip", "scale",
)  # fmt: skip

# What is right by itself may not go together with something else, and then the error may name that.
ANY = ("*",)
ALSO = {
    "vocab_size": ("targets", "weight", "token_ids", "ref"),
    "ignore_index": ANY,
    "weight": ("targets", "token_ids", "vocab_size"),
    "targets": ("max_targets",),
    "token_ids": ("max_targets",),
    "logits": ("targets", "vocab_size"),
    "kl_coef": ("kl",),
}


def spoil(d: Dice, case: Case, about: str | None = None) -> None:
    """One change or two; ``about``: one, of this argument."""
    for _ in range(1 if about else d.pick(1, 1, 1, 2)):
        if about is None and d.chance(0.03):
            case.given["foo"] = d.pick(1, None)
            found = Change("foo", "no such argument", "must")
        else:
            name = about or chosen(d, case)
            found = change(d, case, name, case.given.get(name, parameters(case.function)[name].default))
        if found is not None:
            case.changes.append(found)


def chosen(d: Dice, case: Case) -> str:
    """An argument that is given, mostly, and not changed yet."""
    done = {c.name.split("[")[0] for c in case.changes} | {"foo"}
    given = [x for x in case.given if x not in done]
    return d.pick(*(given if given and d.chance(0.7) else [x for x in parameters(case.function) if x not in done]))


def change(d: Dice, case: Case, name: str, x: Any) -> Change | None:
    """A new value for the argument ``name``, which is ``x`` so far."""
    if name == "ref_head":
        return reference_head(d, case)
    if name in ("ref", "per_token", "per_sequence") and isinstance(x, (tuple, list)):
        return inside(d, case, name, x)
    if name == "checks" and any(c.what.startswith("entry") for c in case.changes):
        return None  # ids out of range that nobody checks
    new, what, verdict = value(d, case, name, x)
    if what == "":
        return None
    set_to(case, name, new)
    if name in STRUCTURE:  # which entries count is another matter now
        case.busy.clear()
        case.idle.clear()
        for c in case.changes:
            c.verdict = "may" if c.what.startswith("entry") else c.verdict
    return Change(name, what, verdict, ANY if together(what) else ALSO.get(name, ()))


def value(d: Dice, case: Case, name: str, x: Any) -> values.New:
    if isinstance(x, Tensor):
        return tensors.tensor(d, case, name, x)
    if name == "clip" and case.function != "value_loss":
        return values.pair(d)
    if name == "objective":
        return values.objective(d)
    if name in FLAGS:
        return values.flag(d)
    if name in ("dtype", "device"):
        return values.place(d, name)
    if isinstance(x, str) or name == "scale":
        return values.choice(d, name)
    if name in ("tp_group", "process_group"):
        return d.pick("gloo", 3, [0, 1]), "no group", "must"
    if name in tensors.OPTIONAL:
        return tensors.instead(d, case, name, torch.ones(2))
    return values.number(d, case, name)


def together(what: str) -> bool:
    """Two tensors no longer go together, and an error may name the other."""
    return "] became [" in what or "became torch." in what or what == "became meta"


def set_to(case: Case, name: str, new: Any) -> None:
    case.given[name] = case.plain[name] = new
    case.plain[name] = case.says(name, default=False) if name in FLAGS else plain(new)
    if not (isinstance(new, Tensor) and new.requires_grad):
        case.wanted = tuple(x for x in case.wanted if x != name)


def plain(x: Any) -> Any:
    """As the oracle can read it; what it cannot read stays as it is."""
    if isinstance(x, Tensor):
        if x.is_meta or x.is_nested or x.is_quantized:
            return x
        x = x.detach()
        x = x.to_dense() if x.layout != torch.strided else x
        x = torch.tensor(x.tolist(), dtype=x.dtype).view(x.shape) if x.is_inference() else x.clone()
        return x.float() if "float8" in str(x.dtype) else x.long() if "uint" in str(x.dtype) else x
    if isinstance(x, (tuple, list)):
        return type(x)(plain(y) for y in x)
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return x.item() if isinstance(x, np.generic) else x


def inside(d: Dice, case: Case, name: str, x: Any) -> Change | None:
    """A tuple of tensors: itself, or one of its members."""
    if x and d.chance(0.7):
        i = d.whole(0, len(x) - 1)
        new, what, verdict = tensors.tensor(d, case, f"{name}[{i}]", x[i])
        if what == "" or new is MISSING:
            return None
        set_to(case, name, tuple(new if j == i else y for j, y in enumerate(x)))
        others = ANY if together(what) else (name, *(ALSO["weight"] if name == "ref" else ()))
        return Change(f"{name}[{i}]", what, verdict, others)
    new = d.pick("xy", 3, (1, 2), [None], {"a": 1}, (*x, "x"), x[0] if x else torch.ones(2), None)
    set_to(case, name, new)
    verdict = "may" if new is None or isinstance(new, Tensor) else "must"
    return Change(name, f"became {type(new).__name__}", verdict, (f"{name}[0]", f"{name}[1]", "cu_seqlens"))


def reference_head(d: Dice, case: Case) -> Change | None:
    if all(case.given.get(k) is None for k in ("ref", "ref_hidden")):
        return None
    words = {"foo": 1}, {"softcap": -1.0}, {"bias": "x"}, {"logit_scale": math.nan}, {"temperature": 2.0}
    new = d.pick("x", 3, [("softcap", 1.0)], *words)
    set_to(case, "ref_head", new)
    return Change("ref_head", f"became {new}", "must")
