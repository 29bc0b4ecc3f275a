"""Are these numbers right? Budgets are computed: what torch itself loses, and a few roundings of what went in."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.fuzz.draw import Case
from tests.fuzz.oracle import HEADED, Outputs
from tests.fuzz.truth import Truth, full, working

A_FEW = 8  # ulps, as in ``tests.support.problems``


class Fault(AssertionError):
    """What is wrong with a call."""


def compare(case: Case, outputs: Outputs, grads: Outputs, true: Truth) -> None:
    silent(case, {**outputs, **{f"the gradient of {name}": x for name, x in grads.items()}})
    dtype, scores = full(case), case.plain.get("scores")
    scale = true.largest if case.function in HEADED else 0.0 if scores is None else 2 * size(scores.double())
    for name, x in outputs.items():
        if name in ("metrics.tolerance/lost", "metrics.tolerance/dense"):
            if not 0 <= x <= (case.plain["tolerance"] if name.endswith("lost") else 1):
                raise Fault(f"{name} is {x}")
            continue
        logged = name.startswith("metrics.")  # counts, which may be float32
        exact, yard = true.outputs[name], true.value_error[name]
        if (x.dtype != dtype and not logged) or x.shape != exact.shape:
            raise Fault(f"{name} is {x.dtype}{list(x.shape)}, wants {dtype}{list(exact.shape)}")
        unit = torch.finfo(torch.float32 if logged else dtype).eps
        near(case, name, x, exact, 4 * yard + A_FEW * unit * max(size(exact), scale, float(logged)))
    missing = true.outputs.keys() - outputs.keys()
    if missing:
        raise Fault(f"no {missing}")
    slopes(case, grads, true)


def silent(case: Case, outputs: Outputs) -> None:
    """What is not finite and went in may not come out unseen."""
    sayable = re.compile(r"bias|logits|per_")  # a target that cannot be said; what only the objective knows
    changes = [c for c in case.changes if re.search(r"entry.*\b(nan|inf)", c.what) and not sayable.match(c.name)]
    if not changes or not case.checks or any(c.verdict == "never" for c in changes):
        return
    for name, x in outputs.items():
        if not x.isfinite().all() and not name.startswith("metrics."):
            raise Fault(f"{changes[0].name}: {changes[0].what}, and {name} became {x.flatten()[:5].tolist()}")


def extreme(case: Case) -> bool:
    """Numbers that overflow on the way, though they are some."""
    return any(re.search(r"e[-+]\d\d|entry.*\binf\b", c.what) for c in case.changes if c.verdict != "never")


def size(x: Tensor) -> float:
    x = x[x.isfinite()]
    return x.abs().max().item() if x.numel() else 0.0


def near(case: Case, name: str, x: Tensor, exact: Tensor, budget: float, norm: bool = False) -> None:
    clear = exact.isfinite() & (exact.abs() < min(1e30, torch.finfo(x.dtype).max))
    if extreme(case):  # what is left after 1e30 - 1e30 is anybody's guess
        return
    if not x[clear].isfinite().all():
        raise Fault(f"{name} is not finite: {x.flatten()[:5].tolist()}, right is {exact.flatten()[:5].tolist()}")
    off = (x.double() - exact)[clear]
    error = (off.norm() if norm else off.abs().max()).item() if off.numel() else 0.0
    if error > budget:  # a budget that is NaN is none: torch itself has no number there
        got, right = x.flatten()[:6].tolist(), exact.flatten()[:6].tolist()
        raise Fault(f"{name}: off by {error:.2e}, allowed {budget:.2e}; got {got}, right is {right}")


def slopes(case: Case, grads: Outputs, true: Truth) -> None:
    """Gradients; a weight's may lie in ``weight_grad``."""
    ulp = torch.finfo(full(case)).eps
    buffer = grads.get("weight_grad")
    if buffer is not None:
        if "weight" in grads:
            raise Fault("weight has a gradient beside weight_grad")
        true_one = true.gradients.get("weight")
        if true_one is None:
            near(case, "weight_grad", buffer, torch.zeros_like(buffer, dtype=torch.float64), 0.0)
        else:
            held = size(case.given["weight_grad"].detach().double()) * case.given["weight_grad"].numel() ** 0.5
            near(case, "weight_grad", buffer, true_one, allowed(case, "weight", true) + A_FEW * ulp * held, norm=True)
    for name in case.wanted if case.mode == "grad" else ():
        exact = true.gradients.get(name)
        if exact is None or (name == "weight" and buffer is not None):
            continue
        got = grads.get(name)
        if got is None:
            if exact.any():
                raise Fault(f"{name} has no gradient")
            continue
        leaf = case.given[name]
        if got.dtype != leaf.dtype or got.shape != leaf.shape:
            raise Fault(f"gradient of {name} is {got.dtype}{list(got.shape)}, wants {leaf.dtype}{list(leaf.shape)}")
        near(case, f"gradient of {name}", got, exact, allowed(case, name, true), norm=True)
        idle = case.idle.get(name)
        if idle is not None and got[idle].any():
            raise Fault(f"{name}: an entry that never matters has a gradient")


def allowed(case: Case, name: str, true: Truth) -> float:
    """Of a gradient's error, in L2: torch's own in the same dtype, and roundings of the logits' gradient."""
    dtype = working(case)
    leaf = case.plain[name].dtype if isinstance(case.plain.get(name), Tensor) else dtype
    coarse = max(torch.finfo(dtype).eps, torch.finfo(leaf).eps)
    ulp = torch.finfo(full(case)).eps
    exact = true.gradients[name]
    other = {"hidden": "weight", "weight": "hidden"}.get(name)
    beyond = case.plain[other].double().nan_to_num().norm().item() if other else 1.0
    lost = min(case.plain.get("tolerance") or 0.0, 1.0)
    spread = true.slope * beyond
    tiny = torch.finfo(leaf).smallest_normal * max(1, exact.numel()) ** 0.5
    rounding = (coarse + A_FEW * ulp) * max(exact.norm().item(), spread)
    return 4 * true.gradient_error[name] + rounding + lost * spread + tiny
