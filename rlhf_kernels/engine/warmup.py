"""Pay for the first call before the first step."""

from __future__ import annotations

import torch

from rlhf_kernels import checks as check
from rlhf_kernels.backends import resolve
from rlhf_kernels.engine.fused import fused_loss
from rlhf_kernels.engine.op import token_stats
from rlhf_kernels.types import TokenStats

ROWS, MOST = 32, 4096


def _alike(vocab_size: int) -> int:
    """A smaller vocabulary for which the same kernels are compiled: divisible by 16 or not, as the real one."""
    return vocab_size if vocab_size <= MOST else MOST if vocab_size % 16 == 0 else MOST - 1


def _log_likelihood(stats: TokenStats, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, dict]:
    return stats.logp.sum(), {}


def _found(device: str | torch.device) -> torch.device:
    """The device, if tensors with data can be made there."""
    try:
        found = torch.device(device) if isinstance(device, (str, torch.device)) else None
        there = found is not None and found.type != "meta" and torch.empty(1, device=found) is not None
    except Exception:  # A build of torch without that device may raise anything.
        found, there = None, False
    check.wants(there, "device", device, "one that is here, such as 'cpu' or 'cuda:0'")
    assert found is not None
    return found


def warmup(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, *, device: str | torch.device = "cpu", backend: str = "auto"
) -> str:
    """Run the head once, so that the first training step does not pay for what is lazy.

    Scoring, statistics with all gradients, and a loss that only looks at log-probabilities: on a GPU each of them has
    kernels of its own, which Triton compiles at their first launch (and keeps on disk). On a CPU what is lazy is
    loading the extension, starting the threads and, on the backend "eager", what torch prepares for its first matrix
    products. Nothing is kept.

    Args:
        hidden_size: H.
        vocab_size: V; at most 4096 columns of it are run, as many as divide alike.
        dtype: of hidden states and weight.
        device: where training will run.
        backend: as in ``HeadOptions``.

    Returns:
        The name of the backend that ran.

    Raises:
        ValueError: a size, dtype or device that no head here can have.
        RuntimeError: the backend cannot run here.

    >>> rk.warmup(8, 100, torch.float32, backend="eager")
    'eager'
    """
    for name, size in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        check.wants(check.is_count(size), name, size, "a positive whole number")
    check.wants(dtype in check.FLOATS, "dtype", dtype, "float32, bfloat16, float16 or float64 of torch")
    device = _found(device)
    hidden = torch.zeros(ROWS, hidden_size, dtype=dtype, device=device, requires_grad=True)
    weight = torch.zeros(_alike(vocab_size), hidden_size, dtype=dtype, device=device, requires_grad=True)
    targets = torch.zeros(ROWS, dtype=torch.int64, device=device)
    with torch.no_grad():
        token_stats(hidden, weight, targets, backend=backend)
    with torch.enable_grad():
        stats = token_stats(hidden, weight, targets, backend=backend)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        fused_loss(hidden, weight, targets, _log_likelihood, backend=backend).loss.backward()
    module = resolve(backend, device, dtype)
    return str(getattr(module, "__name__", backend)).rpartition(".")[2]
