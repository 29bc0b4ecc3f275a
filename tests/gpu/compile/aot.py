"""Kernels compiled for chips that are not here, exactly as our own launchers would launch them there.

``launches`` runs a launcher on small CPU tensors and notes what it would have launched; ``compiled`` builds that for a
chip; ``Resources`` reads from the cubin what ptxas made of it.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Launch(NamedTuple):
    """One kernel with its arguments' types; equal for launches that would share a binary."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Within it kernels are noted and not run."""
    found: list[Launch] = []
    run = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        found.append(_launch(self, args, kwargs))

    JITFunction.run = note
    try:
        yield found
    finally:
        JITFunction.run = run


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = tuple((k, kwargs.pop(k)) for k in OPTIONS if k in kwargs)
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    types, constants, aligned = [], [], []
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    for name in kernel.arg_names:
        x = given[name]
        if name in constexpr or x is None or (type(x) is int and x == 1):  # as a real launch specialises
            types.append((name, "constexpr"))
            constants.append((name, x))
            continue
        types.append((name, _type(x)))
        if (type(x) is int and x % 16 == 0) or (isinstance(x, torch.Tensor) and x.data_ptr() % 16 == 0):
            aligned.append(name)
    return Launch(kernel, tuple(types), tuple(constants), tuple(aligned), options)


def _type(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return "*" + TYPES[x.dtype]
    if isinstance(x, bool):
        return "i1"
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    if isinstance(x, float):
        return "fp32"
    return f"tensordesc<{TYPES[x.base.dtype]}{list(x.block_shape)}>"


class Resources(NamedTuple):
    """What a kernel takes of a chip."""

    registers: int
    stack: int
    spills: int  # instructions that store to or load from local memory
    shared: int
    products: dict[str, int]  # tensor-core instructions
    instructions: int
    epilogue: int  # instructions after the last product of halves; all of them where there is none


def compiled(launch: Launch, chip: str) -> Resources:
    """Build one launch for one chip."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    major, minor = CHIPS[chip]
    built = triton.compile(source, target=GPUTarget("cuda", major * 10 + minor, 32), options=dict(launch.options))
    return _resources(built)


def _resources(built: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", sass, re.M)
    mix = collections.Counter(names)
    products = {name: count for name, count in mix.items() if "MMA" in name}
    spills = mix["STL"] + mix["LDL"]
    last = max((i for i, name in enumerate(names) if "MMA" in name), default=-1)
    return Resources(
        int(found[1]), int(found[2]), spills, built.metadata.shared, products, len(names), len(names) - 1 - last
    )


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], capture_output=True, text=True, check=True).stdout


def noted(launch: Callable[[], object]) -> list[Launch]:
    """What one call launches, each binary once."""
    with launches() as found:
        launch()
    return list(dict.fromkeys(found))
