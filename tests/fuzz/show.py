"""A call in words, so that it can be read and run again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.fuzz.draw import Case


def show(x: Any) -> str:
    if isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) for y in x):
        return f"{type(x).__name__}({', '.join(map(show, x))})"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in x.items()) + "}"
    if not isinstance(x, Tensor):
        text = getattr(x, "__name__", None) or repr(x)
        return text if len(text) < 60 else text[:57] + "..."
    try:
        what = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    except Exception:
        return f"a {x.layout} tensor"
    if str(x.layout) != "torch.strided" or x.is_meta or x.is_nested:
        return f"{what} {x.layout} on {x.device}"
    if not x.is_contiguous():
        what += f" strides {x.stride()}"
    what += " requires grad" if x.requires_grad else ""
    if x.numel() <= 12 and "float8" not in what and not x.is_quantized:
        what += f" {_rounded(x.detach().tolist())}"
    return what


def _rounded(x: Any) -> Any:
    if isinstance(x, list):
        return [_rounded(y) for y in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def report(case: Case, said: str) -> str:
    lines = [f"seed {case.seed}: rk.{case.function}"]
    if case.changes:
        lines += [f"  changed: {c.name}: {c.what} ({c.verdict})" for c in case.changes]
    mode = case.mode + (f", autocast {case.autocast}" if case.autocast else "")
    lines += [f"  {k} = {show(v)}" for k, v in case.given.items()]
    lines += [f"  mode {mode}, gradients of {', '.join(case.wanted) or 'nothing'}, {case.positional} by position"]
    lines += [f"  {said}", f"  again: python -m tests.fuzz --seed {case.seed}"]
    return "\n".join(lines)
