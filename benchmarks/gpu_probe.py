"""Measures what the GPU design rests on: JSON out, under eight minutes on a Hopper GPU.

    python benchmarks/gpu_probe.py --out probe.json     # on a GPU
    python benchmarks/gpu_probe.py --device cpu         # the same code at tiny sizes; says what it could not run

Shapes: N rows, H hidden, V vocabulary, K entries of a sparse row; logits = hidden [N, H] @ weight [V, H].T.
Each section runs in a process of its own, so that a bad kernel or a hang costs one section and never the others.
A cell gives median, min and max of n calls in ms (L2 emptied before each on a GPU), or ``error`` (why it could not
run) or ``skipped``; ``deviation`` is the distance from float64 on sampled rows, and what gets it wrong is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_probe_kernels as kernels
import torch
from gpu_probe_kernels import triton
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter has no faithful bf16: it gets fp32
LIMITS = {"logp": 1e-3, "rows": 5e-3}  # of logp absolute, of rows relative L2: bf16 results round by up to 2^-8


class Probe:
    """One section's view of the world: where it runs, at what sizes, how long it may, and where its cells go."""

    def __init__(self, device: str, seconds: float, log: str) -> None:
        self.device, self.deadline, self.log, self.cuda = device, time.monotonic() + seconds, log, device == "cuda"
        self.V, self.N, self.hiddens = (151936, 8192, (896, 2048, 4096)) if self.cuda else (200, 32, (128,))
        # Only CUDA multiplies bf16 into fp32; a CPU walks the same code with results in the inputs' type.
        self.outputs: dict[str, Any] = {"bf16": {}, "fp32": {"out_dtype": torch.float32}} if self.cuda else {"same": {}}

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32 if INTERPRET else torch.bfloat16).mul_(std)

    def emit(self, **cell: Any) -> None:
        rounded = json.loads(json.dumps(cell), parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=str)
        with open(self.log, "a") as log:
            log.write(json.dumps(rounded) + "\n")

    def time(self, call: Any, check: Any = None, flop: float = 0, moved: float = 0, **cell: Any) -> None:
        """Time a call and emit its cell; ``check`` makes entries of its result; flop and bytes become rates."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("the section's time is spent")
        try:
            cell |= check(call()) if check else {}
            if not all(error < LIMITS[kind] for kind, error in cell.get("deviation", {}).items()):
                raise ValueError("wrong result")
            if self.cuda:
                spans: Any = triton.testing.do_bench(call, 20, 150, return_mode="all")
            else:
                spans = [1e3 * timeit.timeit(call, number=1) for _ in range(1 if INTERPRET else 3)]
        except Exception as error:  # out of memory, an unsupported type, a compiler's refusal: all of them are findings
            return self.emit(**cell, error=brief(error))
        ms = statistics.median(spans)
        rates = {name: rate for name, rate in {"tflops": flop / ms / 1e9, "gb_per_s": moved / ms / 1e6}.items() if rate}
        self.emit(**cell, ms=ms, min_ms=min(spans), max_ms=max(spans), n=len(spans), **rates)


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def deviation(rows: Any, exact: Tensor, out: Tensor) -> dict[str, Any]:
    return {"deviation": {"rows": ((out[rows].double() - exact).norm() / exact.norm()).item()}}


def device(p: Probe) -> None:
    """The machine and its two ceilings: bytes copied and bf16 products per second."""
    size = 8192 if p.cuda else 256
    a, b = p.randn(size, size), p.randn(size, size)
    versions: list[Any] = [module and module.__version__ for module in (torch, triton)]
    about = dict(zip(("torch", "triton"), versions, strict=True)) | {"python": sys.version.split()[0]}
    about["gpu"] = str(torch.cuda.get_device_properties(0)) if p.cuda else None
    if p.cuda and shutil.which("nvidia-smi"):
        for _ in range(600):  # the clocks of a busy GPU: these products are still running while they are read
            torch.mm(a, b)
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        about["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    p.emit(**about)
    source = torch.ones((2 << 30) if p.cuda else (1 << 20), dtype=torch.int8, device=p.device)
    p.time(partial(torch.empty_like(source).copy_, source), moved=2 * len(source), op="copy")
    p.time(partial(torch.mm, a, b), flop=2 * size**3, op="square product")


def cublas(p: Probe) -> None:
    """The three products of the head, bf16 in, bf16 against fp32 out; the weight's gradient also with beta = 1."""
    for H, N in itertools.product(p.hiddens, (p.N // 2, p.N)):
        hidden, weight, e = p.randn(N, H), p.randn(p.V, H, std=4 / H**0.5), p.randn(N, p.V)
        strips = sorted({min(4096, p.V), min(16384, p.V), p.V})  # two that nearly fit the L2, and everything
        for out, kwargs in p.outputs.items():
            what: dict[str, Any] = {"H": H, "N": N, "out": out}
            for V in strips:
                check = partial(deviation, slice(8), hidden[:8].double() @ weight[:V].double().T)
                call = partial(torch.mm, hidden, weight[:V].T, **kwargs)
                p.time(call, check, **what, op="logits", V=V, flop=2 * N * H * V)
            what |= {"V": p.V, "flop": 2 * N * H * p.V}
            p.time(partial(torch.mm, e, weight, **kwargs), **what, op="dX")
            p.time(partial(torch.mm, e.T, hidden, **kwargs), **what, op="dW")
            dw = torch.zeros(p.V, H, device=p.device, dtype=kwargs.get("out_dtype", weight.dtype))
            p.time(partial(torch.addmm, dw, e.T, hidden, out=dw, **kwargs), **what, op="dW, beta = 1, in place")


def epilogue(p: Probe) -> None:
    """A Triton GEMM that exponentiates and sums on its way out, against cuBLAS on the same shapes."""
    if not triton:
        return p.emit(skipped="no triton")
    variants = list(itertools.product(kernels.MODES, (True, False)))
    if not (p.cuda or INTERPRET):
        for mode, tma in variants:
            config = kernels.CONFIGS[0] | kernels.MODES[mode] | {"TMA": tma}
            built = kernels.compile_for(90, kernels.anchored_gemm_kernel, config)
            p.emit(mode=mode, TMA=tma, **built, skipped="no GPU: compiled only")
        return
    for H in p.hiddens:
        hidden, weight = p.randn(p.N, H), p.randn(p.V, H, std=4 / H**0.5)
        targets = torch.randint(p.V, (p.N,), device=p.device)
        anchor = (hidden.float() * weight[targets].float()).sum(1)
        exact = hidden[:16].double() @ weight.double().T
        exact_e = (exact - exact.gather(1, targets[:16, None])).exp()
        what: dict[str, Any] = {"H": H, "flop": 2 * p.N * H * p.V}
        for out, kwargs in p.outputs.items():
            p.time(partial(torch.mm, hidden, weight.T, **kwargs), **what, mode=f"cuBLAS, {out} out")
        for tile, (mode, tma) in itertools.product(kernels.CONFIGS if p.cuda else kernels.CONFIGS[:1], variants):
            config = tile | kernels.MODES[mode] | {"TMA": tma}
            call, sums, e = kernels.anchored_gemm(hidden, weight, anchor, config)
            check = partial(epilogue_check, config, exact_e if config["EXP"] else exact, sums, e)
            p.time(call, check, **what, mode=mode, config=config)


def epilogue_check(config: dict[str, Any], exact: Tensor, sums: Tensor, e: Tensor, handle: Any) -> dict[str, Any]:
    """What the first launch left behind, against the exact logits or exponentials of the first rows."""
    errors = deviation(slice(len(exact)), exact, e)["deviation"] if config["STORE"] else {}
    if config["EXP"]:
        logp = -sums.sum(0)[: len(exact)].double().log()
        errors["logp"] = (logp + exact.sum(1).log()).abs().max().item()
    return {"deviation": errors} | {name: getattr(handle, name, None) for name in ("n_regs", "n_spills")}


def backward(e: Tensor, weight: Tensor, hidden: Tensor, rows: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both backward products on some rows: an index copies them first, a slice looks at them where they are."""
    if isinstance(rows, Tensor):
        e, hidden, rows = e.index_select(0, rows), hidden.index_select(0, rows), slice(None)
    return torch.mm(e[rows], weight, **kwargs), torch.mm(e[rows].T, hidden[rows], **kwargs)


def gathered(p: Probe) -> None:
    """Backward on the rows that a loss keeps, gathered into a copy or sorted into a prefix (kept = 1: dense)."""
    for H, kept in itertools.product(p.hiddens, (1.0, 0.7, 0.5, 0.3)):
        e, weight, hidden, count = p.randn(p.N, p.V), p.randn(p.V, H), p.randn(p.N, H), int(kept * p.N)
        index = torch.randperm(p.N, device=p.device)[:count].sort().values
        for name, rows in {"gathered": index, "prefix": slice(count)}.items():
            call = partial(backward, e, weight, hidden, rows, [*p.outputs.values()][-1])
            p.time(call, flop=4 * count * H * p.V, H=H, kept=kept, rows=name)
        p.time(partial(e.index_select, 0, index), moved=4 * count * p.V, kept=kept, rows="gather alone")


def second_runtime(p: Probe) -> None:
    """Our own kernel, with a CUDA runtime of its own linked in, between torch's kernels on torch's stream."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return p.emit(skipped="no nvcc")
    arch = "".join(map(str, torch.cuda.get_device_capability())) if p.cuda else "90"
    library = kernels.build_add(nvcc, arch)
    if not p.cuda:
        return p.emit(runtime=library.version(), skipped="no GPU: built and loaded only")
    x, y = torch.zeros(2, 1 << 20, device=p.device)

    def launch() -> None:
        if code := library.launch(y.data_ptr(), x.data_ptr(), len(y), torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"cudaError {code}")

    def step(value: int) -> None:
        torch.cuda._sleep(200_000)  # about 0.1 ms, in which a launch that does not wait for the stream would add zeros
        x.fill_(value)
        launch()
        x.zero_()

    for name, stream in {"default stream": torch.cuda.default_stream(), "side stream": torch.cuda.Stream()}.items():
        with torch.cuda.stream(stream):
            y.zero_()
            for value in range(1, 101):
                step(value)
            p.emit(op=name, correct=bool((y == 5050).all()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(3)
    y.zero_()
    graph.replay()
    graph.replay()
    p.emit(op="CUDA graph", correct=bool((y == 6).all()))
    for name, call in {"ours": launch, "torch": partial(y.add_, x)}.items():
        p.emit(op=f"host time of a launch, {name}", us=1e3 * timeit.timeit(call, number=1000))


def csr_ways(p: Probe, offsets: Tensor, columns: Tensor, values: Tensor, dense: Tensor, add: bool, **cell: Any) -> None:
    """Time every way at hand to multiply a CSR matrix [len(offsets) - 1, len(dense)] with a dense one."""
    filled = (offsets.diff() > 0).nonzero()[:, 0]
    sample = filled[:: max(1, len(filled) // 8)]
    entries = [slice(*offsets[i : i + 2].tolist()) for i in sample]
    check = partial(deviation, sample, torch.stack([values[s].double() @ dense[columns[s]].double() for s in entries]))
    bag = {"offsets": offsets, "mode": "sum", "per_sample_weights": values, "include_last_offset": True}
    p.time(partial(torch.nn.functional.embedding_bag, columns, dense, **bag), check, **cell, way="embedding_bag")
    matrix = torch.sparse_csr_tensor(offsets, columns, values, (len(offsets) - 1, len(dense)))
    p.time(partial(torch.mm, matrix, dense), check, **cell, way="sparse CSR mm")
    if triton and (p.cuda or INTERPRET):
        call, out = kernels.csr_product(offsets, columns, values, dense, add)
        p.time(call, lambda _: check(out), **cell, way="Triton")


def sparse(p: Probe) -> None:
    """Rows of K entries times the weight, and the transposed product for its gradient, against the dense products."""
    for H in p.hiddens:
        weight, hidden, e = p.randn(p.V, H), p.randn(p.N, H), p.randn(p.N, p.V)
        p.time(partial(torch.mm, e, weight), H=H, op="dX", way="dense")
        p.time(partial(torch.mm, e.T, hidden, **[*p.outputs.values()][-1]), H=H, op="dW", way="dense")
        for K, ids in itertools.product((16, 64, 256) if p.cuda else (4, 20), ("uniform", "zipf")):
            what, u = {"H": H, "K": K, "ids": ids}, torch.rand(p.N * K, device=p.device, dtype=torch.float64)
            columns, values = (u * p.V if ids == "uniform" else p.V**u - 1).long(), p.randn(p.N * K)
            offsets = torch.arange(0, p.N * K + 1, K, device=p.device)
            csr_ways(p, offsets, columns, values, weight, False, **what, op="dX")
            # Sorted by vocabulary id the same entries are the transposed matrix: no atomics, so bitwise repeatable.
            p.time(partial(torch.sort, columns, stable=True), **what, op="dW", way="sort for Triton")
            found, order = columns.sort(stable=True)
            offsets = torch.searchsorted(found, torch.arange(p.V + 1, device=p.device))
            csr_ways(p, offsets, order // K, values[order], hidden, True, **what, op="dW")
    for add in (False, True) if not (triton and (p.cuda or INTERPRET)) else ():
        built = kernels.compile_for(90, kernels.csr_kernel, kernels.CSR | {"ADD": add}) if triton else {}
        p.emit(ADD=add, way="Triton", **built, skipped="no GPU: compiled only" if built else "no triton")


Section = Callable[[Probe], None]
SECONDS: dict[Section, int] = {device: 20, cublas: 85, epilogue: 160, gathered: 50, second_runtime: 30, sparse: 100}


def work(section: Section, where: str, log: str) -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse")
    probe = Probe(where, SECONDS[section], log)
    try:
        section(probe)
    except Exception as error:
        probe.emit(error=brief(error))


def run(context: Any, section: Section, where: str) -> dict[str, Any]:
    """Run a section in a fork; what it had found before it failed or was stopped is kept."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as log:
        process = context.Process(target=work, args=(section, where, log.name))
        process.start()
        process.join(SECONDS[section] + 4)
        process.kill()
        process.join()
        cells = [json.loads(line) for line in log]
    result: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "cells": cells}
    if process.exitcode:
        result["error"] = f"stopped: exit code {process.exitcode}"
    print(f"{section.__name__}: {len(cells)} cells in {result['seconds']} s {result.get('error', '')}", file=sys.stderr)
    return result


def main() -> None:
    names = {section.__name__: section for section in SECONDS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: stdout)")
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="the sections to run")
    args = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    with fork.Pool(1) as pool:  # asking here would start CUDA in this process and so spoil it for the forks
        found = pool.apply(torch.cuda.is_available)
    if args.device == "cuda" and not found:
        parser.error("--device cuda: no CUDA device is available; use cpu")
    where = "cuda" if found and args.device != "cpu" else "cpu"
    with open(args.out or os.dup(1), "w") as out:  # opened now: a wrong path should not cost eight minutes
        report = {name: run(fork, names[name], where) for name in args.only}
        out.write(json.dumps({"device": where, "sections": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
