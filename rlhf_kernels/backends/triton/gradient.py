"""From what the forward kept to gradients of logits, in place: the one line of calculus.

dz_v = p_v (g_lse - g_logp - g_entropy (log p_v + entropy) + g_kl (log p_v - log q_v - kl)) + g_mean / V
       + g_logp [v = target], and back through temperature, softcap and scale.

Legend: N rows, V vocabulary, K targets.
"""

# Triton's types are no Python types.
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.calculus import LN2, exponentials, log2, row_scale, to_logits, weighted
from rlhf_kernels.backends.triton.operands import Norms, Rows
from rlhf_kernels.backends.triton.rows import piece
from rlhf_kernels.backends.triton.table import Pieces
from rlhf_kernels.types import Grads, TokenStats

SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)  # what is below is no number for ``log2``

# a user's tensors may begin anywhere; one kernel serves them all
UNALIGNED = ["targets", "temperature", "entropy", "kl", "g_logp", "g_entropy", "g_lse", "g_mean", "g_kl"]


@triton.jit
def logit_gradients(
    kept, kept_ref, bias, anchor, log_s, anchor_ref, log_s_ref, entropy, kl, targets, temperature,
    g_logp, g_entropy, g_lse, g_mean, g_kl, V, ld_kept, ld_ref, scale, softcap, per_t, row, columns, in_n, in_v,
    K: tl.constexpr, EXP: tl.constexpr, RAW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    PER_TOKEN: tl.constexpr, HAS_REF: tl.constexpr, FORWARD_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """[rows, columns]. ``kept`` holds exponentials (EXP), logits, or logits before bias and all else (RAW)."""
    inside = in_n & in_v
    a, norm = tl.load(anchor + row, mask=in_n, other=0.0), tl.load(log_s + row, mask=in_n, other=0.0)
    per_row = row_scale(temperature, per_t, row, in_n, PER_TOKEN)
    x = tl.load(kept + row * ld_kept + columns, mask=inside, other=0.0).to(tl.float32)
    to_product = scale * per_row  # goes into numbers of a row, of which there are fewer than logits
    if EXP:
        d = log2(x) * LN2  # -inf of an exponential that underflowed, which has no weight either
        p = x * exponentials(-norm)
        z = d + a
    else:
        z = to_logits(x, bias, columns, in_v, scale, softcap, per_row, HAS_BIAS, HAS_CAP) if RAW else x
        d = z - a
        p = exponentials(d - norm)
    of_p = tl.zeros_like(norm)
    if HAS_LSE:
        of_p += tl.load(g_lse + row, mask=in_n, other=0.0)
    for k in tl.static_range(K):
        of_p -= tl.load(g_logp + row * K + k, mask=in_n, other=0.0)
    of_p *= to_product
    if HAS_ENTROPY:
        h = tl.load(entropy + row, mask=in_n, other=0.0)
        g_h = tl.load(g_entropy + row, mask=in_n, other=0.0) * to_product
        g = tl.where(x < SMALLEST if EXP else p == 0.0, 0.0, p * (of_p - g_h * (d + (h - norm))))  # 0 log 0 = 0
    else:
        g = p * of_p
    if HAS_MEAN:
        g += tl.load(g_mean + row, mask=in_n, other=0.0) * to_product / V
    if HAS_REF:
        z_ref = tl.load(kept_ref + row * ld_ref + columns, mask=inside, other=0.0)
        a_ref, norm_ref = (
            tl.load(anchor_ref + row, mask=in_n, other=0.0),
            tl.load(log_s_ref + row, mask=in_n, other=0.0),
        )
        log_q = (z_ref - a_ref) - norm_ref
        if FORWARD_KL:
            by_kl = p - exponentials(log_q)
        else:
            by_kl = weighted(p, (d - norm) - log_q - tl.load(kl + row, mask=in_n, other=0.0))
        g += by_kl * (tl.load(g_kl + row, mask=in_n, other=0.0) * to_product)
    for k in tl.static_range(K):
        target = tl.load(targets + row * K + k, mask=in_n, other=-1)
        hit = columns == tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        g += tl.where(hit, tl.load(g_logp + row * K + k, mask=in_n, other=0.0) * to_product, 0.0)
    if HAS_CAP:
        share = z / (per_row * softcap)  # -inf where an exponential underflowed, which is flat as well
        g *= 1.0 - tl.minimum(share * share, 1.0)
    return g


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    kept, kept_ref, bias, anchor, log_s, anchor_ref, log_s_ref, entropy, kl, targets, temperature,
    g_logp, g_entropy, g_lse, g_mean, g_kl, V, ld_kept, ld_ref, scale, softcap, per_t,
    out, N, ld_out,
    K: tl.constexpr, EXP: tl.constexpr, RAW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    PER_TOKEN: tl.constexpr, HAS_REF: tl.constexpr, FORWARD_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of a few rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_n, in_v = row < N, columns < V
    g = logit_gradients(
        kept, kept_ref, bias, anchor, log_s, anchor_ref, log_s_ref, entropy, kl, targets, temperature,
        g_logp, g_entropy, g_lse, g_mean, g_kl, V, ld_kept, ld_ref, scale, softcap, per_t, row, columns, in_n, in_v,
        K, EXP, RAW, HAS_BIAS, HAS_CAP, PER_TOKEN, HAS_REF, FORWARD_KL, HAS_ENTROPY, HAS_LSE, HAS_MEAN,
    )  # fmt: skip
    tl.store(out + row * ld_out + columns, g.to(out.dtype.element_ty), mask=in_n & in_v)


class Calculus(NamedTuple):
    """What ``logit_gradients`` is given, for kernels that begin with it."""

    tensors: tuple[Any, ...]
    options: dict[str, Any]


def calculus(
    rows: Rows, kept: Tensor, kept_ref: Tensor | None, stats: TokenStats, norms: Norms, grads: Grads
) -> Calculus:
    """``norms`` are anchor and log sum of policy and reference."""
    policy, raw = rows.policy, rows.policy.weight is None

    def column(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    return Calculus(
        (
            kept, kept_ref, policy.bias, *norms, column(stats.entropy), column(stats.kl), rows.targets,
            rows.temperature, column(grads.logp), column(grads.entropy), column(grads.lse), column(grads.mean_logit),
            column(grads.kl), rows.vocab, kept.stride(0), 0 if kept_ref is None else kept_ref.stride(0),
            policy.scale, policy.softcap or 1.0, rows.per_t,
        ),
        {
            "K": rows.targets.shape[1], "EXP": rows.keeps_exponentials and not raw, "RAW": raw,
            "HAS_BIAS": policy.bias is not None, "HAS_CAP": policy.softcap is not None,
            "PER_TOKEN": rows.temperature is not None,
            "HAS_REF": rows.reference is not None and grads.kl is not None, "FORWARD_KL": rows.forward_kl,
            "HAS_ENTROPY": grads.entropy is not None, "HAS_LSE": grads.lse is not None,
            "HAS_MEAN": grads.mean_logit is not None,
        },
    )  # fmt: skip


def gradients(
    rows: Rows, kept: Tensor, kept_ref: Tensor | None, out: Tensor, stats: TokenStats, norms: Norms, grads: Grads,
    pieces: Pieces,
) -> None:  # fmt: skip
    """Fill ``out`` [N, V], which may be ``kept`` itself."""
    given, block = calculus(rows, kept, kept_ref, stats, norms, grads), piece(rows.vocab, pieces)
    gradient_kernel[(triton.cdiv(rows.count, pieces.rows), triton.cdiv(rows.vocab, block))](
        *given.tensors, out, rows.count, out.stride(0),
        **given.options, ROWS=pieces.rows, BLOCK=block, num_warps=pieces.num_warps,
    )  # fmt: skip
