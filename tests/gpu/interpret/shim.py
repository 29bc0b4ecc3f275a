"""What Triton's interpreter (3.6) gets wrong about bfloat16, put right, so that kernels can be judged on a CPU.

The interpreter keeps bfloat16 as bits in uint16. Left alone it multiplies those bits as whole numbers in ``tl.dot`` and
in arithmetic (https://github.com/triton-lang/triton/issues/11584), and cuts float32 off where hardware rounds it.
"""

from __future__ import annotations

from types import SimpleNamespace

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
    InterpreterBuilder.create_inline_asm = create_inline_asm
    interpreter.ReduceOps.generic_reduce = in_halves
    _index_of_one_element()


def _flushed(x: np.ndarray) -> np.ndarray:
    """Zero where float32 is denormal, as ``.ftz`` has it."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


# Every instruction that kernels write themselves, rounded to float32 and then off by as much as the PTX manual allows:
# two ulps of 2^t; 2^-22 of log2(x), absolute near one and relative elsewhere. The signs alternate with the bits.
def _ex2(t: np.ndarray) -> np.ndarray:
    return _flushed(_off(np.exp2(t.astype(np.float64)), 2.0**-22, t))


def _lg2(x: np.ndarray) -> np.ndarray:
    exact = np.log2(_flushed(x).astype(np.float64))
    near = (x >= 0.5) & (x <= 2.0)
    return np.where(near, exact + _signs(x) * 2.0**-22, _off(exact, 2.0**-22, x)).astype(np.float32)


def _off(exact: np.ndarray, by: float, given: np.ndarray) -> np.ndarray:
    return (exact * (1 + by * _signs(given))).astype(np.float32)


def _signs(given: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(given).view(np.uint32)
    return 1.0 - 2.0 * ((bits ^ (bits >> 7)) & 1)


INSTRUCTIONS = {"ex2.approx.ftz.f32 $0, $1;": _ex2, "lg2.approx.ftz.f32 $0, $1;": _lg2}


def in_halves(self, given):
    """A reduction as hardware does it, half by half; the interpreter's own goes element by element, for minutes."""
    found = given
    while (size := found[0].handle.data.shape[self.axis]) > 1:
        cut = [np.split(x.handle.data, [size // 2], self.axis) for x in found]
        left, right = ([self.to_tensor(c[i], x.dtype) for c, x in zip(cut, found, strict=True)] for i in (0, 1))
        found = self.combine_fn.fn(*left, *right)
        found = found if isinstance(found, tuple) else (found,)
    kept = [x.handle.data if self.keep_dims else np.squeeze(x.handle.data, self.axis) for x in found]
    return [self.to_tensor(data if data.shape else data.item(), x.dtype) for data, x in zip(kept, found, strict=True)]


def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
    found = TensorHandle(INSTRUCTIONS[asm](values[0].data), tl.float32)
    return SimpleNamespace(get_result=lambda index: found)


def _index_of_one_element() -> None:
    """numpy 2.4 refuses int(array([3])), which ``range`` with a bound known only at run time needs."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patched
