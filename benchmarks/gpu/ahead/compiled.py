"""Compiles the kernels that stages launch for a chip that is not here, into Triton's cache.

    python -O -m benchmarks.gpu.ahead.compiled CACHE sm_90 head,correctness

(-O, since some peers assert that tensors are on a GPU.) The stages themselves run, at their own shapes, on CPU tensors:
a driver that knows only the chip's name goes as far as Triton goes before it loads what it compiled, so that every key
in the cache is that of a launch. Nothing is computed with large tensors, whose pages are never touched. All results are
thrown away.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CHIPS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
LARGE = 2**21  # elements of a tensor with which nothing is computed, and whose memory is never touched


class Driver:
    """Of a chip that is not here. What was compiled is loaded nowhere."""

    def __init__(self, capability: tuple[int, int]) -> None:
        compiler: Any = importlib.import_module("triton.backends.compiler")
        self.target = compiler.GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132},
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
        )

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextlib.contextmanager
def launched(capability: tuple[int, int]) -> Iterator[dict[str, bool]]:
    """In the block launches compile and do nothing: hash of each kernel, with its name -> whether the cache had it."""
    runtime: Any = importlib.import_module("triton.runtime")
    knobs: Any = importlib.import_module("triton.knobs")
    found: dict[str, bool] = {}

    def listen(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        found.setdefault(f"{src.name} {metadata['hash'][:12]}", cache_hit)

    before, active, listener = runtime.driver._default, runtime.driver._active, knobs.compilation.listener
    driver = Driver(capability)
    runtime.driver._default = driver
    runtime.driver.set_active(cast(Any, driver))
    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        runtime.driver._default, runtime.driver._active = before, active
        knobs.compilation.listener = listener


class Idle(TorchDispatchMode):
    """Large tensors have shapes and no contents: they are allocated, and never touched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        named = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | kwargs
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        large = max(map(torch.Tensor.numel, given), default=0) > LARGE or _grows(named.get("size"), given)
        if not given and large:
            default = torch.int64 if "randint" in func.name() else torch.get_default_dtype()
            return _zeros(torch.empty(named["size"], dtype=named.get("dtype") or default))
        view = schema.returns and all(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not large or view:
            result = func(*args, **kwargs)
            # a kernel that does not run leaves what was there: let it be zeros
            return _zeros(result) if "empty" in func.name() else result
        if schema.is_mutable:
            written = [named[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write]
            return None if not schema.returns else written[0] if len(schema.returns) == 1 else tuple(written)
        try:
            shapes = func(*tree_map(_shape, args), **tree_map(_shape, kwargs))
        except (NotImplementedError, RuntimeError):  # how much there is depends on what is there
            return func(*args, **kwargs)
        return tree_map(_room, shapes)


def _grows(size: Any, given: list[Tensor]) -> bool:
    """Whether small tensors, or none, become a large one: one of this size, or of what they are broadcast to."""
    try:
        shape = size if isinstance(size, list | tuple) else torch.broadcast_shapes(*(x.shape for x in given))
    except RuntimeError:  # they are not
        return False
    return math.prod(shape) > LARGE


def _shape(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else None if isinstance(x, torch.Generator) else x


def _room(x: Any) -> Any:
    return _zeros(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)) if isinstance(x, Tensor) else x


def _zeros(x: Tensor) -> Tensor:
    return x.zero_() if x.numel() <= LARGE else x


@contextlib.contextmanager
def world(capability: tuple[int, int]) -> Iterator[None]:
    """In the block everything is launched as on the chip, by its entry of the table and by the GPU's backend, though
    the tensors are on the CPU. Each step runs once.
    """
    from benchmarks.contenders import roster
    from benchmarks.contenders.base import Contender
    from benchmarks.gpu import fake
    from benchmarks.gpu.stages import clock, peers
    from rlhf_kernels.backends.triton import table

    backends = importlib.import_module("rlhf_kernels.backends")  # the package has a function of this name

    def with_kernels(op: str, *rest: Any) -> list[Contender]:
        return [x for x in roster.contenders(op, *rest) if x.gpu or x.side == "ours"]

    def turns(steps: dict[str, Any], rounds: int, left: Any) -> dict[str, list[float]]:
        for step in steps.values():
            step()
        return {name: [1.0] for name in steps}

    def peak(step: Any) -> float:
        step()
        return 0.0

    def counts(step: Any) -> dict[str, int]:
        step()
        return {}

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fake, "CAPABILITY", capability))
        stack.enter_context(fake.faked())
        stack.enter_context(mock.patch.object(table, "INTERPRETED", table.BY_CAPABILITY[capability]))
        stack.enter_context(mock.patch.object(backends, "_cannot", return_value=None))
        stack.enter_context(mock.patch.object(roster, "wants_gpu"))
        stack.enter_context(mock.patch.multiple(clock, in_turns=turns, peak=peak, counts=counts))
        stack.enter_context(mock.patch.multiple(peers, contenders=with_kernels, in_turns=turns))
        stack.enter_context(Idle())
        yield


def compiled(chip: str, stages: list[str]) -> dict[str, bool]:
    """Compile what these stages launch; what of them cannot go on without a GPU is said and left out."""
    from benchmarks.gpu.context import Context
    from benchmarks.gpu.record import Record

    with launched(CHIPS[chip]) as found, world(CHIPS[chip]), tempfile.TemporaryDirectory() as folder:
        for name in stages:
            began, before = time.monotonic(), len(found)
            record = Record(Path(folder))
            with mock.patch.object(record, "say"):
                record.begin(name, math.inf)
                ctx = Context(name, record, math.inf, dry=False)
                ctx.place = "cpu"
                try:
                    importlib.import_module(f"benchmarks.gpu.stages.{name}").run(ctx)
                except Exception as error:
                    print(f"{name}: ended by {type(error).__name__}: {error}", flush=True)
            reasons = {row["failed"] for row in record.stages[name]["rows"] if "failed" in row}
            for reason in sorted(x for x in reasons if not x.startswith("wrong: ")):  # all results are
                print(f"{name}: a part of it {reason}", flush=True)
            print(f"{chip} {name}: {len(found) - before} kernels, {time.monotonic() - began:.0f} s", flush=True)
    return found


def main(argv: list[str]) -> int:
    from benchmarks.gpu.ahead import carried

    folder, chip, stages = argv
    os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_STORE_BINARY_ONLY": "1"}
    carried.agree(carried.triton_key())
    return 0 if compiled(chip, stages.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
