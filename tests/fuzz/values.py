"""Bad and odd values for whatever is not a tensor: (value, what it is, verdict)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.draw import INF, NAN, Case, Dice, unused

New = tuple[Any, str, str]
NOTHING: New = (None, "", "")


def good_number(case: Case, name: str, x: float) -> bool:
    """What the docs allow a number to be."""
    if isinstance(x, int) and abs(x) > 2**1000:  # no float holds it
        return x > 0 or name == "ignore_index"
    finite, fn = math.isfinite(x), case.function
    if name in ("temperature", "softcap") or (name == "beta" and fn != "shaped_rewards"):
        return finite and x > 0
    if name in ("logit_scale", "loss_scale"):
        return finite and x != 0
    if name == "tolerance":
        return 0 < x < 1
    if name == "label_smoothing":
        return 0 <= x <= (1 if fn == "sft_loss" else 0.5)
    if name in ("gamma", "lam"):
        return 0 <= x <= 1
    if name == "dual_clip":
        return x > 1
    if name in ("clip", "kl_clip") or (name == "eps" and fn == "whiten"):
        return x > 0
    if name in ("entropy_coef", "margin") or (name == "kl" and fn == "kto_loss"):
        return finite
    if name in ("vocab_size", "max_bytes", "max_targets", "unit", "top", "groups", "hidden_size"):
        return isinstance(x, int) and x > 0
    if name == "ignore_index":
        return isinstance(x, int)
    return finite and x >= 0


def number(d: Dice, case: Case, name: str) -> New:
    """For a number, or None where a number may be."""
    if d.chance(0.6):
        new = d.pick(NAN, NAN, INF, -INF, -1.0, -3, 0, 0.0, 1, 0.3, 1e-30, 1e30, 2**70, -(2**70), 10**400)
        if name == "loss_scale" and case.plain.get("weight_grad") is not None:
            new = d.pick(NAN, INF, 0.0)  # any other number does not fit what reaches the loss
        return new, f"became {new!r}"[:60], "may" if good_number(case, name, new) or unused(case, name) else "must"
    if d.chance(0.5):
        return zero_dimensional(d, case, name)
    new = d.pick(True, np.float32(0.5), np.float64(NAN), np.array(0.5), np.ones(2), torch.ones(2), torch.ones(1), None)
    new = d.pick(new, new, "x", [0.1], 1j, {}, object())
    nan = isinstance(new, np.float64) and not unused(case, name)
    numeric = new is None or isinstance(new, (bool, np.generic, np.ndarray, Tensor))
    return new, f"became {new!r}"[:60], "may" if (numeric and not nan) or unused(case, name) else "must"


def zero_dimensional(d: Dice, case: Case, name: str) -> New:
    """A tensor of one number, which denominators may be."""
    if d.chance(0.1):
        return torch.ones((), device="meta"), "became meta", "may" if unused(case, name) else "must"
    new = d.pick(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32), torch.tensor(1j))
    new = d.pick(new, torch.tensor(d.pick(NAN, INF, -1.0)))
    value, price = complex(new.item()), name == "beta" and case.function == "shaped_rewards"
    negative = value.real < 0 and (name.startswith("num_") or price)
    bad = value.imag != 0 or ((negative or not math.isfinite(value.real)) and case.checks)
    return new, f"became a 0-d {new.dtype} of {new.item()}", "must" if bad and not unused(case, name) else "may"


def choice(d: Dice, name: str) -> New:
    words = "unknown", "", "K3", b"k3", ["k3"], ("k3",), {"k3": 1}, np.array(["k3", "k2"]), torch.ones(2), None, 3, True
    new = d.pick(*words, *(("triton",) * 3 if name == "backend" else ()))
    return new, f"became {new!r}"[:60], "may" if name == "scale" and new is None else "must"


def place(d: Dice, name: str) -> New:
    """For a dtype or a device."""
    wrong = ("meta", "nowhere", "cuda:99") if name == "device" else (torch.int64, torch.float8_e4m3fn, torch.complex64)
    new = d.pick(*wrong, None, "x", 1.5, [])
    return new, f"became {new!r}", "must"


def flag(d: Dice) -> New:
    odd = "x", "", None, 2, 0, 0.5, NAN, 1j, [], [0], np.bool_(True), np.ones(2), torch.ones(2), torch.tensor(True)
    new = d.pick(*odd)
    return new, f"became {new!r}"[:60], "may"


def pair(d: Dice) -> New:
    """For the clip of a policy loss."""
    if d.chance(0.35):
        new = d.pick((2**70, 0.1), (0.1, 2**70), (0.1, 10**400), (0.2, INF), (True, 0.2), (torch.tensor(0.2), 0.2))
        new = d.pick(new, new, np.array([0.2, 0.3]), torch.tensor([0.2, 0.3]))
        return new, f"became {new!r}"[:60], "may"
    numbers = (0.2,), (0.2,) * 3, (0.2, NAN), (NAN, 0.2), (-0.1, 0.2), (0.2, -0.1), (0.2, 1j), (0.2, "x"), (None, 0.2)
    new = d.pick(*numbers, 0.2, "ab", None, {0.1, 0.3}, {0.2: 0.3, 0.4: 0.5}, [[0.2], [0.2]])
    return new, f"became {new!r}"[:60], "must"


def objective(d: Dice) -> New:
    """That of ``fused_loss``: no function, or one that returns something else."""
    returns = {
        "a vector": lambda s: (s.logp.double()[:, None], {}),
        "no metrics": lambda s: s.logp.sum(),
        "a float": lambda s: (1.0, {}),
        "None for metrics": lambda s: (s.logp.sum(), None),
        "a metric without count": lambda s: (s.logp.sum(), {"x": 1.0}),
        "a metric that is a vector": lambda s: (s.logp.sum(), {"x": (s.logp[:, None], 1.0)}),
    }
    new = d.pick(None, "x", 3, torch.ones(2), *returns)
    if new in returns if isinstance(new, str) else False:
        return (lambda stats, cu, *columns: returns[new](stats)), f"became one that returns {new}", "must"
    return new, f"became {new!r}", "must"
