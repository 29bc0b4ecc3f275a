"""What is right in float64, and how far torch itself is from it in the precision of the call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import HALF, MISSING, Case, parameters, unused
from tests.fuzz.oracle import HEADED, Args, Outputs, outputs

UPSTREAM = 1.7  # of every loss without a ``loss_scale``
SAMPLES = 3  # of float32's rounding
BACKSTAGE = (  # changes no number
    "backend", "max_bytes", "tolerance", "weight_grad", "loss_scale", "tp_group", "process_group", "max_targets",
    "checks", "overwrite",
)  # fmt: skip
WHOLE = ("targets", "token_ids", "cu_seqlens", "groups")
INPUTS = ("hidden", "weight", "bias", "logits", "ref_hidden", "ref_weight")  # of the matrix product


def autocast(case: Case) -> torch.dtype | None:
    """That of the matrix product; ready logits meet none."""
    return None if case.function == "token_stats_from_logits" else case.autocast


def working(case: Case) -> torch.dtype:
    """That of the matrix product, or of scores and values: whatever comes out is this, but no less than float32."""
    x = case.plain
    if case.function in HEADED:
        dtype = x["logits" if case.function == "token_stats_from_logits" else "hidden"].dtype
        return dtype if dtype == torch.float64 else autocast(case) or dtype
    if case.function == "warmup":
        return torch.float32
    names = {"gae": ("rewards", "values"), "shaped_rewards": ("logp", "ref_logp"), "value_loss": ("values",)}
    first, *rest = [
        x[name].dtype for name in names.get(case.function, ("x" if case.function == "whiten" else "scores",))
    ]
    return torch.promote_types(first, rest[0]) if rest else first


def full(case: Case) -> torch.dtype:
    return torch.promote_types(working(case), torch.float32)


def arguments(case: Case, dtype: torch.dtype, noise: torch.Generator | None = None) -> Args:
    """Those of the oracle in ``dtype``; ``noise``: every float is off by a rounding of float32 (float64)."""
    unit, cast = torch.finfo(full(case)).eps, autocast(case)

    def lift(name: str, y: Any) -> Any:
        if isinstance(y, (list, tuple)) and any(isinstance(z, Tensor) for z in y):
            return tuple(lift(f"{name}[{i}]", z) for i, z in enumerate(y))
        if isinstance(y, dict):
            return {k: lift(k, z) for k, z in y.items()}
        if isinstance(y, int) and abs(y) > 2**62:
            return float(y) if abs(y) < 2**1000 else float("inf")
        if isinstance(y, Tensor) and name.startswith("num_"):
            return float(y)
        if not isinstance(y, Tensor) or name == "ranks":  # of which only the order matters
            return y
        if name in WHOLE:
            return y.long()
        if not y.is_floating_point():
            return y
        inside = name in INPUTS or name.startswith("ref[")
        if inside and cast is not None and y.dtype != torch.float64:
            y = y.to(cast)
        y = y.to(dtype if inside else torch.promote_types(dtype, torch.float32))
        if noise is not None and y.dtype not in HALF:
            y = y * (1 + unit * (2 * torch.rand(y.shape, generator=noise, dtype=y.dtype) - 1))
        return y.detach()

    asked = {k: v for k, v in case.plain.items() if k not in BACKSTAGE and v is not MISSING and not unused(case, k)}
    allowed = parameters(case.function)
    for name, y in asked.items():
        if y is None and not allowed[name].may_be_none:
            raise ValueError(f"{name}: None")
    x = {name: lift(name, y) for name, y in asked.items() if y is not None or name in ("scale", "old_logp")}
    return {**x, "dtype": dtype} if case.function in HEADED else x


def cotangents(case: Case, found: Outputs) -> Outputs:
    """Gradients from above, the same for the library and for the oracle."""
    if "loss" in found:
        scale = case.plain.get("loss_scale", 1.0) if case.plain.get("weight_grad") is not None else UPSTREAM
        return {"loss": torch.tensor(float(scale), dtype=torch.float64)}
    rng = torch.Generator().manual_seed(case.seed)
    live = [name for name in found if name != "top1"]
    chosen = [name for i, name in enumerate(live) if (case.seed >> i) % 3 != 2] or live[:1]
    return {name: torch.randn(found[name].shape, generator=rng, dtype=torch.float64) for name in chosen}


def backward(found: Outputs, leaves: Outputs, above: Outputs) -> Outputs:
    """Gradients of the leaves, by name; those that no output depends on are not there."""
    pairs = [(found[k], above[k].to(found[k].dtype)) for k in above if k in found and found[k].requires_grad]
    if not pairs or not leaves:
        return {}
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def evaluate(case: Case, dtype: torch.dtype, noise: torch.Generator | None = None) -> tuple[Outputs, Outputs]:
    x = arguments(case, dtype, noise)
    wanted = case.wanted if case.mode == "grad" else ()
    leaves = {name: x[name].requires_grad_() for name in wanted if isinstance(x.get(name), Tensor)}
    found = outputs(case.function, x)
    grads = backward(found, leaves, cotangents(case, found))
    return {k: v.detach() for k, v in found.items()}, grads


@dataclass
class Truth:
    outputs: Outputs
    gradients: Outputs
    value_error: dict[str, float]  # of torch in float32 (float64), by name; the largest
    gradient_error: dict[str, float]  # of torch in the same dtype; its norm
    slope: float = 0.0  # norm of the gradient of the logits
    largest: float = 1.0  # of the logits, or one


def truth(case: Case) -> Truth:
    found, grads = evaluate(case, torch.float64)
    dtype, rng = working(case), torch.Generator().manual_seed(case.seed)
    true = Truth(found, grads, dict.fromkeys(found, 0.0), dict.fromkeys(grads, 0.0))
    runs = [(full(case), rng)] * SAMPLES
    if case.function in HEADED:
        true.slope, true.largest = at_the_logits(case)
        runs += [(dtype, None)] if dtype in HALF else []
    for each, noise in runs:
        some, slopes = evaluate(case, each, noise)
        for name, x in some.items():
            if name in found and each == full(case) and x.numel():
                error = (x.double() - found[name]).abs().max().item()
                true.value_error[name] = max(true.value_error[name], error)
        for name, x in slopes.items():
            true.gradient_error[name] = max(true.gradient_error[name], (x.double() - grads[name]).norm().item())
    return true


def at_the_logits(case: Case) -> tuple[float, float]:
    """Norm of the gradient of ``hidden @ weight.T``, and its largest entry: an identity takes the weight's place."""
    inside = {k: v for k, v in arguments(case, torch.float64).items() if k in INPUTS}
    name = "logits" if "logits" in inside else "hidden"
    product = inside["logits"] if "logits" in inside else inside["hidden"] @ inside["weight"].T
    changed = {name: product}
    if name == "hidden":
        changed["weight"] = torch.eye(product.shape[-1], dtype=torch.float64)
    other = replace(case, plain={**case.plain, **inside, **changed}, wanted=(name,))
    _, grads = evaluate(other, torch.float64)
    largest = max(1.0, product.nan_to_num().abs().max().item() if product.numel() else 0.0)
    # p - 1 of a token that is nearly certain is as exact as p, and so are the logs of p and q
    vocab, rows = case.plain.get("vocab_size") or product.shape[-1], max(1, product[..., 0].numel())
    logs = vocab == 1 or case.plain.get("ref") is not None or case.function == "kl_divergence"
    certain = rows**0.5 * (4 * largest if logs else 1.0)
    return grads[name].norm().item() + certain if name in grads else 0.0, largest
