"""What Triton's interpreter (3.6) gets wrong about bfloat16, put right, so that kernels can be judged on a CPU.

The interpreter keeps bfloat16 as bits in uint16. Left alone it multiplies those bits as whole numbers in ``tl.dot`` and
in arithmetic (https://github.com/triton-lang/triton/issues/11584), and cuts float32 off where hardware rounds it.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32, to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    near = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), np.uint16(0x7FC0), near)


def _is_bf16(x: TensorHandle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _wide(x: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(x.data), tl.float32) if _is_bf16(x) else x


def install() -> None:
    """Patch the interpreter's builder, once."""
    if hasattr(InterpreterBuilder, "rounds_bf16"):
        return
    InterpreterBuilder.rounds_bf16 = True
    np.seterr(all="ignore")  # numpy says what hardware keeps to itself: operations on lanes whose result is masked
    binary, unary, cast = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, InterpreterBuilder.cast_impl
    convert, dot = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def binary_op(self, a, b, op):
        if not (_is_bf16(a) or _is_bf16(b)):
            return binary(self, a, b, op)
        out = op(_wide(a).data, _wide(b).data)
        return TensorHandle(out if out.dtype == bool else rounded(out), a.dtype.scalar)

    def unary_op(self, a, op):
        return TensorHandle(rounded(op(widened(a.data))), a.dtype.scalar) if _is_bf16(a) else unary(self, a, op)

    def cast_impl(self, a, to):
        if to.scalar == tl.bfloat16 and not _is_bf16(a):
            return TensorHandle(rounded(a.data.astype(np.float32)), to.scalar)
        if _is_bf16(a) and to.scalar != tl.bfloat16:
            return _wide(a) if to.scalar == tl.float32 else cast(self, _wide(a), to)
        return cast(self, a, to)

    def create_fp_to_fp(self, a, to, mode):
        return cast_impl(self, a, to) if tl.bfloat16 in (a.dtype.scalar, to.scalar) else convert(self, a, to, mode)

    def create_dot(self, a, b, c, *rest):
        return dot(self, _wide(a), _wide(b), c, *rest)

    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary_op, unary_op
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast_impl, create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot

    def create_fma(self, a, b, c):
        wide = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return TensorHandle(wide.astype(a.data.dtype), a.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma  # one rounding, as hardware does
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = lambda self, x: cast_impl(self, self.get_fp32(x), tl.bfloat16)
    _index_of_one_element()


def _index_of_one_element() -> None:
    """numpy 2.4 refuses int(array([3])), which ``range`` with a bound known only at run time needs."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patched
