"""Peers whose kernels want a GPU, run by Triton's interpreter at a tiny shape: are they called as they should be?

    python -O -m benchmarks.dry_run             # those installed or unpacked, see RLHF_KERNELS_PEERS

-O, because some assert that their tensors are on a GPU. Interpreting takes seconds a call, and its times mean nothing:
there are only verdicts. Whom the interpreter cannot run is held to the signature in the peer's own source.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gae
from benchmarks.cases import DTYPES, Shape, draw, for_op
from benchmarks.contenders import contenders
from benchmarks.judge import judge_for
from benchmarks.measure import Row, enter
from benchmarks.peers.loading import see_folders

SHAPE = Shape(16, 128, 1024, sequences=4)
OPS = ("score", "train", "sft", "logits", "gae")
# name -> package, file, function, the arguments that its adapter gives
CALLS: dict[str, tuple[str, str, str, tuple[int, tuple[str, ...]]]] = {
    "quack": ("quack", "linear_cross_entropy.py", "chunked_linear_cross_entropy", (3, ())),
    "CCE": ("cut_cross_entropy", "linear_cross_entropy.py", "linear_cross_entropy", (3, ("reduction",))),
}
NAMES = {
    "quack": ("x", "weight", "target"),
    "CCE": ("e", "c", "targets"),
}


def signature_in(source: str, function: str) -> inspect.Signature:
    """Of a function at the top of a source that need not be importable.

    Raises:
        ValueError: there is none of this name.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            spec, kinds = node.args, inspect.Parameter
            plain = [*spec.posonlyargs, *spec.args]
            bare = len(plain) - len(spec.defaults)
            found = [
                kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < bare else None)
                for i, a in enumerate(plain)
            ]
            found += [
                kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
                for a, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
            ]
            return inspect.Signature(found)
    raise ValueError(f"no function {function} in the source")


def check_call(name: str, source: str) -> str:
    """ "ok" if the adapter's call fits the function in this source, else what does not."""
    _, _, function, (places, keywords) = CALLS[name]
    try:
        bound = signature_in(source, function).bind(*range(places), **dict.fromkeys(keywords))
    except (TypeError, ValueError) as error:
        return f"wrong: {error}"
    first = tuple(bound.arguments)[:places]
    return "ok, by its signature" if first == NAMES[name] else f"wrong: its first arguments are {', '.join(first)}"


def calls() -> Iterator[Row]:
    """A row for each peer that is held to its source."""
    see_folders()
    for name, (package, path, function, _) in CALLS.items():
        row: Row = {"contender": f"{name} {function}", "side": "peer", "op": "call", "dtype": ""}
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            yield row | {"verdict": f"skipped: No module named {package!r}"}
            continue
        yield row | {"verdict": check_call(name, Path(spec.submodule_search_locations[0], path).read_text())}


def interpreted(ops: Sequence[str] = OPS) -> Iterator[Row]:
    """A row for each op, dtype and contender that wants a GPU."""
    torch.cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()  # a build without CUDA has no marks to make
    for dtype in ("fp32",):  # the interpreter multiplies bfloat16 wrongly
        base, truth = draw(SHAPE, DTYPES[dtype])
        for op in (op for op in ops if op != "gae"):
            batch, ref_truth = for_op(op, base, truth)
            judge, _ = judge_for(op, batch, truth, ref_truth)
            for contender in contenders(op):
                if contender.gpu and not contender.name.startswith(tuple(CALLS)):
                    yield enter(contender, batch, judge)[0] | {"op": op, "dtype": dtype}
    if "gae" in ops:
        replies = gae.Replies.draw(4, 300)

        def judge_gae(found: gae.Pair) -> tuple[dict[str, float], str]:
            errors = gae.errors_of(found, replies)
            return errors, gae.verdict(errors)

        for contender in gae.CONTENDERS:
            if contender.gpu:
                yield enter(contender, replies, judge_gae)[0] | {"op": "gae", "dtype": "fp32"}


def shown(row: dict[str, Any]) -> str:
    return f"{row['op']:6s} {row['dtype']:4s} {row['contender']}: {row['verdict']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=OPS, help="this op; may be repeated")
    given = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # before any peer makes its kernels
    bad = 0
    for rows in (calls(), interpreted(given.only or OPS)):
        for row in rows:
            print(shown(row), flush=True)
            bad += not row["verdict"].startswith(("ok", "skipped"))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
