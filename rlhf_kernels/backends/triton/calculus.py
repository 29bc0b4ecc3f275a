"""The calculus that every kernel of the head shares, each line once: from products to logits, from logits to sums.

Exponentials are anchored at the target: e = exp(z - a) with a the target's logit, known before the product. Then
sums over the vocabulary need no running maximum and merge by plain addition. A row whose largest
logit is far above its target's is folded once more with that logit as its anchor.

Legend: n rows, v columns of the vocabulary; BLOCK_N and BLOCK_V are the sizes of a tile.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOG2E_REST: tl.constexpr = tl.constexpr(1.92596298909109e-08)  # what float32 leaves of it
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(t):
    """2^t to two ulps; what underflows is zero. Triton's own scales t where the result would be denormal."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """log2(x) to 2^-22, absolute near one and relative elsewhere. Triton's own is a polynomial."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x):
    """From the exponential; near zero, where that has no digits left, from the series."""
    t = tl.exp2(-2.0 * LOG2E * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    q = x * x
    near = x * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def to_logits(z, bias, columns, in_v, scale, softcap, per_t, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """softcap(scale * (z + bias)) / temperature; per_t is one over it, a number or a column."""
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=in_v, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        z = softcap * tanh(z / softcap)
    return z * per_t


@triton.jit
def row_scale(temperature, per_t, rows, in_n, PER_TOKEN: tl.constexpr):
    """One over the temperature of each row, or of all."""
    if PER_TOKEN:
        per_t = 1.0 / tl.load(temperature + rows, mask=in_n, other=1.0)
    return per_t


@triton.jit
def exponentials(d):
    """exp(d). What rounding takes from d log2(e), and log2(e) from itself, would be |d| ulps of the result."""
    t = d * LOG2E
    lost = tl.fma(d, LOG2E, -t) + d * LOG2E_REST
    e = tl.exp2(t)
    return tl.where(e > 0.0, tl.fma(e, lost * LN2, e), e)


@triton.jit
def weighted(e, x):
    """e * x where an e of zero wins over an infinite x: 0 log 0 = 0."""
    return tl.where(e == 0.0, 0.0, e * x)


@triton.jit
def sums_of(d, in_v):
    """What a tile adds to its rows: sum e, sum e d, sum d, max d of d = z - a; d is -inf past the vocabulary.

    One register tile at a time: e is made from d where it is needed.
    """
    most = tl.max(d, 1)
    total = tl.sum(tl.where(in_v, d, 0.0), 1)
    e = exponentials(d)
    return tl.sum(e, 1), tl.sum(weighted(e, d), 1), total, most


@triton.jit
def store_sums(partials, plane, at, in_n, again, s, drop, total, most):
    """``again``: added to what this program has left there before."""
    if again:
        s += tl.load(partials + at, mask=in_n, other=0.0)
        drop += tl.load(partials + plane + at, mask=in_n, other=0.0)
        total += tl.load(partials + 2 * plane + at, mask=in_n, other=0.0)
        most = tl.maximum(most, tl.load(partials + 3 * plane + at, mask=in_n, other=float("-inf")))
    tl.store(partials + at, s, mask=in_n)
    tl.store(partials + plane + at, drop, mask=in_n)
    tl.store(partials + 2 * plane + at, total, mask=in_n)
    tl.store(partials + 3 * plane + at, most, mask=in_n)


@triton.jit
def reference_sums_of(d, d_ref, FORWARD_KL: tl.constexpr):
    """The reference's sum e, the sum of (d - d_ref) or (d_ref - d) under the one that is ahead, and max d_ref."""
    gap = weighted(exponentials(d_ref), d_ref - d) if FORWARD_KL else weighted(exponentials(d), d - d_ref)
    return tl.sum(exponentials(d_ref), 1), tl.sum(gap, 1), tl.max(d_ref, 1)


@triton.jit
def store_reference_sums(partials, plane, at, in_n, again, s, gap, most):
    """As ``store_sums``."""
    if again:
        s += tl.load(partials + 4 * plane + at, mask=in_n, other=0.0)
        gap += tl.load(partials + 5 * plane + at, mask=in_n, other=0.0)
        most = tl.maximum(most, tl.load(partials + 6 * plane + at, mask=in_n, other=float("-inf")))
    tl.store(partials + 4 * plane + at, s, mask=in_n)
    tl.store(partials + 5 * plane + at, gap, mask=in_n)
    tl.store(partials + 6 * plane + at, most, mask=in_n)


@triton.jit
def store_own(own, targets, K, d, rows, in_n, first, columns, V, BLOCK_V: tl.constexpr):
    """Each target's d as this very product gave it: what is compared with its sums must come from where they do."""
    for k in tl.range(0, K):  # pyright: ignore[reportGeneralTypeIssues]
        target = tl.load(targets + rows * K + k, mask=in_n, other=-1)
        here = (target >= first) & (target < first + BLOCK_V) & (target < V)
        if tl.max(here.to(tl.int32), 0) > 0:
            hit = columns == target.to(tl.int32)[:, None]
            tl.store(own + rows * K + k, tl.sum(tl.where(hit, d, 0.0), 1), mask=in_n & here)
