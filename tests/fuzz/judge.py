"""Make a call, twice, and say what is wrong with what came of it."""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from tests.fuzz import oracle, truth
from tests.fuzz.compare import Fault, compare
from tests.fuzz.draw import MISSING, Case, parameters
from tests.fuzz.oracle import Outputs
from tests.fuzz.truth import cotangents

SECONDS = 20  # no call takes so long


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Fault(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=case.autocast or torch.bfloat16, enabled=case.autocast is not None)


def call(case: Case, given: dict[str, Any]) -> Any:
    fn = getattr(rk, case.function)
    given = {k: v for k, v in given.items() if v is not MISSING}
    names = [p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_position = []
    for name in names[: case.positional]:
        if name not in given:
            break
        by_position.append(given.pop(name))
    with contextlib.ExitStack() as stack:
        if case.mode == "no_grad":
            stack.enter_context(torch.no_grad())
        if case.mode == "inference":
            stack.enter_context(torch.inference_mode())
        stack.enter_context(autocast(case))
        return fn(*by_position, **given)


def named(out: Any) -> Outputs:
    found = oracle.named(out)
    if isinstance(out, rk.LossOutput):
        found = {"loss": out.loss, **{f"metrics.{k}": v for k, v in out.metrics.items()}}
    return found


def answer(case: Case) -> tuple[Outputs, Outputs]:
    """Outputs and gradients; ``weight_grad`` is put back as it was, and what was added to it is a gradient."""
    buffer = case.given.get("weight_grad")
    buffer = buffer if isinstance(buffer, Tensor) and buffer.layout == torch.strided and not buffer.is_meta else None
    before = None if buffer is None else buffer.detach().clone()
    outputs = named(call(case, case.given))
    leaves = {name: case.given[name] for name in case.wanted} if case.mode == "grad" else {}
    with autocast(case) if case.seed % 2 else contextlib.nullcontext():  # which may still be on, or not
        grads = truth.backward(outputs, leaves, cotangents(case, outputs))
    if buffer is not None and before is not None:
        grads["weight_grad"] = (buffer.detach() - before).where(before.isfinite(), 0.0)
        with torch.no_grad():
            buffer.copy_(before)
    return {k: v.detach().clone() for k, v in outputs.items()}, grads


def tensors_of(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for y in x.values() for t in tensors_of(y)]
    return [t for y in x for t in tensors_of(y)] if isinstance(x, (tuple, list)) else []


def image(x: Tensor) -> Any:
    """The bytes of a tensor, and what else may not change."""
    if x.is_meta or x.layout != torch.strided or x.is_nested or x.is_quantized:
        return None
    return raw(x), 0 if x.is_inference() else x._version, x.requires_grad, x.grad


def raw(x: Tensor) -> Tensor:
    """A copy of its bytes, whatever its strides."""
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1)).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    return a is None or (torch.equal(a[0], b[0]) and a[1:] == b[1:])


def bitwise(a: Outputs, b: Outputs) -> bool:
    def equal(x: Tensor, y: Tensor) -> bool:
        return x.dtype == y.dtype and x.shape == y.shape and raw(x).equal(raw(y))

    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


# name, or name[0], or several of them, then a colon
NAMED = re.compile(r"[a-z_0-9]+(\[\d+\])?(( or |, | and )[a-z_0-9]+(\[\d+\])?)*: .+")
PYTHON_S_OWN = re.compile(r"\w+\(\) (missing \d+ required|got an unexpected keyword argument|takes|got multiple)")


def good_error(case: Case, error: Exception) -> bool:
    """One line that begins with an argument's name and mentions one that was changed."""
    message = str(error)
    first = re.split(r"[^a-z_0-9]", message)[0]
    late = type(error) is RuntimeError and first in ("backend", "weight_grad", "overwrite")  # no fault of a value
    if "\n" in message or len(message) > 400 or not (late or type(error) in (TypeError, ValueError)):
        return False
    words = set(re.findall(r"[a-z_0-9]+(?:\[\d+\])?", message)) | set(re.findall(r"[a-z_0-9]+", message))
    changes = [c for c in case.changes if c.verdict != "never"]
    if PYTHON_S_OWN.match(message):
        return any(c.name in words for c in changes)
    if not NAMED.fullmatch(message) or first not in {*parameters(case.function), "foo"}:
        return False
    return any("*" in c.also or words & {c.name, *c.also} for c in changes)


def judge(case: Case) -> str:
    """Answer "right" or "refused"; raise ``Fault``."""
    watched = [(name, t) for name, x in case.given.items() for t in tensors_of(x)]
    before = [image(t) for _, t in watched]
    held = {k: list(v) if isinstance(v, (list, tuple, dict)) else None for k, v in case.given.items()}
    result, error = None, None
    with in_time(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "rlhf_kernels runs on the backend 'eager'")  # no compiler
        try:
            result = answer(case)
        except Fault:
            raise
        except Exception as e:
            error = e
    lent = {"logits"} if case.says("overwrite", False) else set()
    lent |= {"weight_grad"} if error is None or "loss_scale" in str(error) else set()
    for (name, t), was in zip(watched, before, strict=True):
        if name not in lent and not same(was, image(t)):
            raise Fault(f"{name}: was changed by the call")
    for k, v in held.items():
        if v is not None and [id(y) for y in v] != [id(y) for y in case.given[k]]:
            raise Fault(f"{k}: was changed by the call")
    if error is not None:
        return refused(case, error)
    assert result is not None
    return answered(case, *result)


def refused(case: Case, error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    if all(c.verdict == "never" for c in case.changes):
        raise Fault(f"a good call was refused: {said}")
    if not good_error(case, error):
        raise Fault(f"the error does not name the argument: {said}")
    return "refused"


def answered(case: Case, outputs: Outputs, grads: Outputs) -> str:
    must = [c for c in case.changes if c.verdict == "must"]
    if must:
        some = {k: "meta" if v.is_meta else v.flatten()[:3].tolist() for k, v in outputs.items()}
        raise Fault(f"{must[0].name}: {must[0].what} was accepted, and came to {some}")
    if not case.checks and case.changes:
        return "right"
    try:
        true = truth.truth(case)
    except Exception as e:
        raise Fault(f"accepted, and the oracle cannot: {type(e).__name__}: {e}") from e
    compare(case, outputs, grads, true)
    if not case.says("overwrite", False):
        again = answer(case)
        if not bitwise(outputs, again[0]) or not bitwise(grads, again[1]):
            raise Fault("a second run gave other bits")
    return "right"
