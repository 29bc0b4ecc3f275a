"""The kernels that ``gpu_probe.py`` measures, the configurations it tries, and their compilation without a GPU.

Shapes: N rows, H hidden, V vocabulary; BLOCK_* are the tile sizes along them.
"""

# Triton may be absent, and its types are no Python types.
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false
from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
jit: Any = triton.jit if triton else lambda function: function


@jit
def anchored_gemm_kernel(
    x, w, e, anchor, sums, N, V, H, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, EXP: tl.constexpr, STORE: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """E = exp(x @ w.T - anchor): each tile's row sums to sums [tiles of V, N], E to e [N, V]; without EXP a plain GEMM.

    x, w and e are tensor descriptors (TMA) or pointers; H must be a multiple of BLOCK_H.
    """
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=PERSISTENT):
        # GROUP tiles of rows walk along the weight together, so that the L2 serves most of their reads of it
        first = tile // (GROUP * tiles_v) * GROUP
        size = tl.minimum(tiles_n - first, GROUP)
        n = (first + tile % (GROUP * tiles_v) % size) * BLOCK_N
        tile_v = tile % (GROUP * tiles_v) // size
        v = tile_v * BLOCK_V
        offs_n, offs_v = n + tl.arange(0, BLOCK_N), v + tl.arange(0, BLOCK_V)
        x_rows = x if TMA else x + tl.where(offs_n < N, offs_n, 0)[:, None].to(tl.int64) * H
        w_rows = w if TMA else w + tl.where(offs_v < V, offs_v, 0)[:, None].to(tl.int64) * H
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for h in tl.range(0, H, BLOCK_H):
            offs_h = h + tl.arange(0, BLOCK_H)[None, :]
            a = x.load([n, h]) if TMA else tl.load(x_rows + offs_h)
            b = w.load([v, h]) if TMA else tl.load(w_rows + offs_h)
            acc = tl.dot(a, b.T, acc)
        if EXP:
            # exp2 of one fused multiply-add (log2(e) = 1.4427): at small H the exponentials rival the GEMM's own time
            anchors = tl.load(anchor + offs_n, mask=offs_n < N, other=0.0) * 1.4426950408889634
            acc = tl.where((offs_v < V)[None, :], tl.exp2(acc * 1.4426950408889634 - anchors[:, None]), 0.0)
            tl.store(sums + tile_v.to(tl.int64) * N + offs_n, tl.sum(acc, 1), mask=offs_n < N)
        if STORE and TMA:
            e.store([n, v], acc.to(e.dtype))
        elif STORE:
            inside = (offs_n < N)[:, None] & (offs_v < V)[None, :]
            tl.store(e + offs_n[:, None].to(tl.int64) * V + offs_v[None, :], acc.to(e.dtype.element_ty), mask=inside)


@jit
def csr_kernel(
    offsets, columns, values, dense, out, H, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """out[i] (+)= sum of values[j] * dense[columns[j]] over j in offsets[i]:offsets[i + 1], in a fixed order."""
    i, offs_h = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    start, end = tl.load(offsets + i), tl.load(offsets + i + 1)
    if start < end or not ADD:  # most rows of a weight's gradient get nothing: leave them untouched
        out_row, total = out + i.to(tl.int64) * H + offs_h, tl.zeros((BLOCK_H,), tl.float32)
        for first in range(start, end, BLOCK_K):
            offs_k = first + tl.arange(0, BLOCK_K)
            value = tl.load(values + offs_k, mask=offs_k < end, other=0.0).to(tl.float32)
            rows = dense + tl.load(columns + offs_k, mask=offs_k < end, other=0)[:, None] * H + offs_h[None, :]
            entries = tl.load(rows, mask=(offs_k < end)[:, None] & (offs_h < H)[None, :], other=0.0)
            total += tl.sum(entries.to(tl.float32) * value[:, None], 0)
        if ADD:
            total += tl.load(out_row, mask=offs_h < H, other=0.0)
        tl.store(out_row, total, mask=offs_h < H)


FIELDS = ("BLOCK_N", "BLOCK_V", "BLOCK_H", "num_warps", "num_stages", "GROUP", "PERSISTENT")
TILES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4)]
CONFIGS: list[Any] = [dict(zip(FIELDS, (*tile, 16, False), strict=True)) for tile in [*TILES, (256, 128, 64, 8, 4)]]
CONFIGS += [CONFIGS[3] | {"GROUP": 64}, CONFIGS[0] | {"PERSISTENT": True}, CONFIGS[3] | {"PERSISTENT": True}]
MODES = {"score": {"EXP": 1, "STORE": 0}, "train": {"EXP": 1, "STORE": 1}, "gemm": {"EXP": 0, "STORE": 1}}
AXES = {"x": "NH", "w": "VH", "e": "NV"}
CSR = {"BLOCK_K": 16, "BLOCK_H": 128}


def anchored_gemm(x: Tensor, w: Tensor, anchor: Tensor, config: dict[str, Any]) -> tuple[Any, Tensor, Tensor]:
    """One configuration's launch, and the sums [tiles of V, N] and E [N, V] that it will fill: NaN until it does."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (N, H), V = x.shape, len(w)
    size = {axis: config[f"BLOCK_{axis}"] for axis in "NVH"}
    if H % size["H"]:
        raise ValueError(f"hidden size {H}: want a multiple of BLOCK_H = {size['H']}")
    sums = torch.full((-(-V // size["V"]), N), float("nan"), device=x.device)
    e = torch.full((N, V), float("nan"), device=x.device, dtype=x.dtype)
    tensors: list[Any] = [x, w, e]
    if config["TMA"]:
        tiles = [[size[axis] for axis in axes] for axes in AXES.values()]
        tensors = [TensorDescriptor.from_tensor(t, tile) for t, tile in zip(tensors, tiles, strict=True)]
    programs = len(sums) * -(-N // size["N"])
    if config["PERSISTENT"] and x.is_cuda:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    return partial(anchored_gemm_kernel[(programs,)], *tensors, anchor, sums, N, V, H, **config), sums, e


def csr_product(offsets: Tensor, columns: Tensor, values: Tensor, dense: Tensor, add: bool) -> tuple[Any, Tensor]:
    """A launch of the sparse product, and the fp32 result that it fills, or adds to."""
    rows, H = len(offsets) - 1, dense.shape[1]
    out = torch.full((rows, H), 0.0 if add else float("nan"), device=dense.device)
    kernel = csr_kernel[(rows, -(-H // CSR["BLOCK_H"]))]
    return partial(kernel, offsets, columns, values, dense, out, H, **CSR, ADD=add), out


ADD_SOURCE = """
#include <cuda_runtime.h>
__global__ void add(float* y, const float* x, long n) {
  long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i < n) y[i] += x[i];
}
extern "C" int version() { int v = 0; cudaRuntimeGetVersion(&v); return v; }
extern "C" int launch(float* y, const float* x, long n, void* stream) {
  add<<<(n + 255) / 256, 256, 0, (cudaStream_t)stream>>>(y, x, n);
  return cudaGetLastError();
}
"""


def build_add(nvcc: str, arch: str) -> ctypes.CDLL:
    """Compile ``ADD_SOURCE`` for an architecture ("90") against a static CUDA runtime, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "add.cu").write_text(ADD_SOURCE)
        flags = ["-shared", "-cudart", "static", "-Xcompiler", "-fPIC", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        built = subprocess.run([nvcc, *flags, "add.cu", "-o", "add.so"], cwd=folder, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"nvcc: {built.stdout} {built.stderr}")
        library = ctypes.CDLL(f"{folder}/add.so")
    library.launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p)
    return library


def compile_for(arch: int, kernel: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Compile a kernel for an architecture, no GPU needed; what its binary says of registers and spills."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("x", "w", "e", "values", "dense"), "*bf16") | dict.fromkeys("NVH", "i32")
    types |= dict.fromkeys(("anchor", "sums", "out"), "*fp32") | dict.fromkeys(("offsets", "columns"), "*i64")
    for name, axes in AXES.items() if config.get("TMA") else ():
        types[name] = f"tensordesc<bf16{[config[f'BLOCK_{axis}'] for axis in axes]}>"
    constants = {name: value for name, value in config.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    options = {name: value for name, value in config.items() if name not in constants}
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", arch, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.check_output([tool, "-res-usage", "-sass", file.name], text=True)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", dump)[0])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", dump))  # stores to and loads from local memory
    return {"arch": f"sm_{arch}", "registers": registers, "stack": stack, "spills": spills}
