"""Causal attention over packed sequences, registered in transformers as ``rk_varlen``.

transformers masks packed input only when it gets neither a cache nor a mask, and leaks across sequences without a
word otherwise. Here the boundaries arrive as ``cu_seq_lens_q`` and no mask is built.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rk_varlen"


def similar_lengths(lengths: list[int], waste: float = 1.5) -> Iterator[list[int]]:
    """Groups sequences, longest first, so that padding a group to its longest costs at most ``waste`` in tokens.

    One call over a padded group is many times cheaper than a loop over hundreds of short sequences, and causal
    attention never looks at padding on the right, so it is as exact.

    Example:
        >>> list(similar_lengths([3, 40, 4]))
        [[1], [2, 0]]
    """
    group: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > waste * (total + lengths[i]):
            yield group
            group, total = [], 0
        group.append(i)
        total += lengths[i]
    yield group


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence, by padding sequences of similar length together.

    Args:
        query: [N, heads, D].
        key: [N, key heads, D].
        value: [N, key heads, E]; E is D but for multi-head latent attention.
        cu_seqlens: [S + 1].
        scale: Factor of the scores; None is 1 / sqrt(D).
        window: Keys that a query sees, itself included; None is all before it.

    Returns:
        [N, heads, E].
    """
    starts, device = cu_seqlens.tolist(), query.device
    lengths = [end - start for start, end in pairwise(starts)]
    home = torch.empty(len(query), dtype=torch.int64, device=device)  # where each row lies in the padded output
    outputs: list[Tensor] = []
    base = 0
    for group in similar_lengths(lengths):
        longest = lengths[group[0]]
        offset = torch.arange(longest, device=device)
        length = torch.tensor([lengths[i] for i in group], device=device)[:, None]
        inside = offset < length  # [g, longest]
        # Beyond the end of a sequence stands its own last row, which no query inside can see. Not a neighbour's: a
        # weight of zero times what is not finite would be seen.
        rows = torch.tensor([starts[i] for i in group], device=device)[:, None] + torch.minimum(offset, length - 1)
        home[rows[inside]] = base + inside.flatten().nonzero().squeeze(1)
        flat = rows.flatten()
        q, k, v = (
            # index_select, because its backward adds whole rows and that of x[flat] goes element by element
            x.flatten(1).index_select(0, flat).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )
        band = None
        if window is not None and window < longest:
            distance = offset[:, None] - offset
            band = (distance >= 0) & (distance < window)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        base += flat.numel()
    return torch.cat(outputs).index_select(0, home).view(*query.shape[:2], value.shape[2])


# flash-attn 3, 4 and 2: the compute capabilities and the widest heads that each has kernels for.
FLASH = (
    ("flash_attn_interface", range(9, 10), 256),
    ("flash_attn.cute", range(9, 12), 128),
    ("flash_attn", range(8, 13), 256),
)
# The arguments by which all of them are called; in betas of the fourth some are missing, or mean something else.
ARGUMENTS = {
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
    "window_size", "deterministic",
}  # fmt: skip


@functools.cache
def flash_attn(major: int, size: int) -> Callable[..., Any] | None:
    """``flash_attn_varlen_func`` of the first flash-attn that is installed and knows the chip and the heads.

    Args:
        major: Of the chip's compute capability.
        size: Of a head.

    Returns:
        None where there is no such flash-attn, or where what there is cannot be imported.
    """
    for name, chips, widest in FLASH:
        if major in chips and size <= widest:
            # The package of the second also holds files of the fourth, without what those import.
            with contextlib.suppress(ImportError, AttributeError):
                found = importlib.import_module(name).flash_attn_varlen_func
                if inspect.signature(found).parameters.keys() >= ARGUMENTS:
                    return found
    return None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """The same on CUDA in half precision: by flash-attn where it is installed, by torch's own kernel elsewhere."""
    flash = flash_attn(torch.cuda.get_device_capability(query.device)[0], query.shape[2])
    if flash is None:
        return torch_attention(query, key, value, cu_seqlens, longest, scale, window)
    # Without a window the argument is left out: -1 is no limit to some of them, None to others.
    limits = {} if window is None else {"window_size": (window - 1, 0)}
    out = flash(
        q=query, k=key, v=value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
        max_seqlen_k=longest, softmax_scale=scale, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(), **limits,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # the fourth always, the third once, adds the log-sum-exp


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """The same by torch's variable-length kernel, on CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:  # torch 2.11 has no grouped keys here
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    left = -1 if window is None else window - 1
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(left, 0))
    assert isinstance(out, Tensor)
    return out


def _fusible(query: Tensor, value: Tensor) -> bool:
    """Kernels for packed sequences want half precision, heads of a multiple of 8 up to 256, and an Ampere or later.

    Not all of them take values of another width than keys.
    """
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and value.shape[-1] == query.shape[-1]
    return half and fits and torch.cuda.get_device_capability(query.device)[0] >= 8


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: [1, heads, N, D] in, [1, N, heads, E] out. Without boundaries: SDPA, for sampling.

    Raises:
        ValueError: If the model asks for something that this attention does not have.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"model: its attention needs {name}, which packed attention does not have")
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is not None or dropout != 0.0 or query.shape[0] != 1:
        raise ValueError("rk_varlen: packed input wants a batch of one, no attention mask and no dropout")
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype == torch.float32:
        # Rotary embeddings leave float32 behind, which no fused kernel takes.
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    if _fusible(query, value):
        assert max_length_q is not None
        out = fused_attention(rows[0], rows[1], rows[2], cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        out = padded_attention(rows[0], rows[1], rows[2], cu_seq_lens_q, scaling, sliding_window)
    return out[None], None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """A mask for left-padded prompts that are being continued; none for packed input."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, _mask)
