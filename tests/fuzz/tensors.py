"""Bad and odd tensors in the place of a good one: (value, what it is, verdict)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.draw import INF, MISSING, NAN, Case, Dice, unused
from tests.fuzz.truth import WHOLE
from tests.fuzz.values import NOTHING, New, number

OPTIONAL = (  # arguments that are tensors where they are given
    "bias", "weight_grad", "token_weight", "ref_logp", "cu_seqlens", "old_values", "mask", "ranks", "bootstrap",
    "old_logp",
)  # fmt: skip
DTYPES = (
    torch.float8_e4m3fn, torch.uint16, torch.int8, torch.int16, torch.bool, torch.complex64, torch.int64, torch.int32,
    torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.float16,
)  # fmt: skip


def instead(d: Dice, case: Case, name: str, x: Tensor) -> New:
    """No tensor at all."""
    listed = x.detach().float().flatten().tolist()
    new = d.pick("x", listed, tuple(listed), np.ones(tuple(x.shape)), 3, 0.5, True, False, 2**70, 1j, {}, object(), len)
    return new, f"became {type(new).__name__}", "may" if unused(case, name) else "must"


def tensor(d: Dice, case: Case, name: str, x: Tensor) -> New:
    ways: list[Callable[..., New]] = [kind, dtype, device, layout, shape, gradient]
    ways += [entry] * 4 if x.is_floating_point() else [whole] * 3 if name in WHOLE else []
    return d.pick(*ways)(d, case, name, x)


def kind(d: Dice, case: Case, name: str, x: Tensor) -> New:
    if d.chance(0.2):  # "may": it may be optional
        return d.pick((None, "became None", "may"), (MISSING, "is missing", "may"))
    if name in ("temperature", "margin", "groups", "kl", "beta") or name.startswith("num_"):
        return number(d, case, name)
    return instead(d, case, name, x)


def dtype(d: Dice, case: Case, name: str, x: Tensor) -> New:
    new = d.pick(*DTYPES)
    if new == x.dtype or (new.is_complex and name.startswith("per_")):  # which may be anything for an objective
        return NOTHING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = x.detach().nan_to_num(0, 0, 0).to(new) if x.is_floating_point() else x.to(new)
    return y, f"became {new}", "may"


def device(d: Dice, case: Case, name: str, x: Tensor) -> New:
    return x.detach().to("meta"), "became meta", "may" if unused(case, name) else "must"


def layout(d: Dice, case: Case, name: str, x: Tensor) -> New:
    x = x.detach().contiguous()
    ways: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: x.to_sparse(),
        "sparse csr": lambda: x.to_sparse_csr(),
        "mkldnn": lambda: x.to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([x, x]),
        "jagged": lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    }
    way = d.pick(*ways)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ways[way](), f"became {way}", "may" if unused(case, name) else "must"
        except Exception:  # torch has no such tensor of this shape and dtype
            return NOTHING


def shape(d: Dice, case: Case, name: str, x: Tensor) -> New:
    y = x.detach()
    ways: dict[str, Callable[[], Tensor]] = {
        "one more": lambda: torch.cat([y, y[:1]]) if y.dim() and len(y) else y[None],
        "one less": lambda: y[:-1] if y.dim() and len(y) else y[None],
        "one less in the last": lambda: y[..., :-1] if y.dim() else y[None],
        "one dimension more": lambda: y[..., None],
        "a dimension in front": lambda: y[None],
        "flat": lambda: y.reshape(-1),
        "transposed": lambda: y.T if y.dim() == 2 else y[None],
        "0-d": lambda: y.reshape(-1)[0] if y.numel() else y.new_zeros(()),
        "empty": lambda: y[:0] if y.dim() else y.new_zeros(0),
    }
    what = d.pick(*ways)
    new = ways[what]()
    return NOTHING if new.shape == y.shape else (new, f"{what}: {list(y.shape)} became {list(new.shape)}", "may")


def entry(d: Dice, case: Case, name: str, x: Tensor) -> New:
    """One entry is not finite, or huge."""
    if x.numel() == 0 or name == "weight_grad":
        return NOTHING
    huge = min(torch.finfo(x.dtype).max, d.pick(1e30, torch.finfo(torch.float32).max))
    value, at = d.pick(NAN, NAN, INF, -INF, huge, -huge), d.whole(0, x.numel() - 1)
    new = x.detach().clone(memory_format=torch.contiguous_format)
    new.view(-1)[at] = value
    if x.requires_grad:
        new.requires_grad_()
    return new, f"entry {at} of {list(x.shape)} became {value}", entry_verdict(case, name, x, at, value)


def entry_verdict(case: Case, name: str, x: Tensor, at: int, value: float) -> str:
    busy, idle = case.busy.get(name), case.idle.get(name)
    if idle is not None and bool(idle.reshape(-1)[at]):
        return "never"
    head = case.plain.get("ref_head") or {}
    capped = (name.startswith("ref") or name == "weight") and ("softcap" in case.plain or "softcap" in head)
    masked = name == "weight" and isinstance(case.plain.get("bias"), Tensor)
    if (name in ("bias", "logits", "ranks") or capped or masked) and abs(value) == INF:
        return "may"  # a token that nobody can say; the last of all; a cap that holds infinity too
    counts = x.dim() == 0 if busy is None else bool(busy.reshape(-1)[at])
    bad = (counts and not math.isfinite(value)) or (name == "temperature" and value < 0)
    own = name.startswith("per_")  # what these may hold only the objective knows
    return "must" if bad and case.checks and not own and not unused(case, name) else "may"


def whole(d: Dice, case: Case, name: str, x: Tensor) -> New:
    """Ids and boundaries out of range."""
    if x.numel() == 0 or not case.checks:
        return NOTHING
    new, most = x.clone(memory_format=torch.contiguous_format), torch.iinfo(x.dtype).max
    at, verdict = d.whole(0, x.numel() - 1), "may"
    if name == "groups":
        new[at] = d.pick(most, -most)
    elif name == "cu_seqlens":
        at = d.pick(0, at, x.numel() - 1)
        new[at] += d.pick(1, -1, 3, -3, 100, 2**31 - 200)
        good = new[0] == 0 and new[-1] == x[-1] and bool((new.diff() >= 0).all())
        verdict = "may" if good or unused(case, name) else "must"
    else:
        head = case.plain.get("logits", case.plain.get("weight"))
        if not isinstance(head, Tensor) or head.dim() < 1:
            return NOTHING
        vocab = case.plain.get("vocab_size") or head.shape[-1 if "logits" in case.plain else 0]
        if not isinstance(vocab, int) or not 0 < vocab < 2**20:
            return NOTHING
        new.view(-1)[at] = d.pick(vocab, vocab + 1000, most - 7, 7 - most, -1, -101)
        ignored = case.plain.get("ignore_index", -100)
        verdict = "must" if isinstance(ignored, int) and new.view(-1)[at] != ignored else "may"
    return new, f"entry {at} became {int(new.view(-1)[at])}", verdict


def gradient(d: Dice, case: Case, name: str, x: Tensor) -> New:
    """A leaf where nobody expects one, or a tensor made under inference."""
    if not x.is_floating_point():
        return NOTHING
    if d.chance(0.5):
        with torch.inference_mode():
            return x.detach().clone(), "was made in inference mode", "may"
    return NOTHING if name in case.wanted else (x.detach().clone().requires_grad_(), "requires grad", "may")
