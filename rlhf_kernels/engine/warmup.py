"""Pay for the first call before the first step."""

from __future__ import annotations

import torch

from rlhf_kernels.backends import resolve
from rlhf_kernels.engine.op import token_stats

ROWS = 32


def warmup(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, *, device: str | torch.device = "cpu", backend: str = "auto"
) -> str:
    """Run the head once, forward and backward, so that the first training step does not pay for what is lazy.

    On a CPU that is loading the extension, starting the threads and, on the backend "eager", what torch prepares for
    its first matrix products. Nothing is kept.

    Args:
        hidden_size: H.
        vocab_size: V; at most 4096 columns of it are run.
        dtype: of hidden states and weight.
        device: where training will run.
        backend: as in ``HeadOptions``.

    Returns:
        The name of the backend that ran.

    Raises:
        ValueError: an argument has no head.
        RuntimeError: the backend cannot run here.

    >>> rk.warmup(8, 100, torch.float32, backend="eager")
    'eager'
    """
    device = torch.device(device)
    hidden = torch.zeros(ROWS, hidden_size, dtype=dtype, device=device, requires_grad=True)
    weight = torch.zeros(min(vocab_size, 4096), hidden_size, dtype=dtype, device=device, requires_grad=True)
    targets = torch.zeros(ROWS, dtype=torch.int64, device=device)
    with torch.enable_grad():
        token_stats(hidden, weight, targets, backend=backend).logp.sum().backward()
    module = resolve(backend, device, dtype)
    return str(getattr(module, "__name__", backend)).rpartition(".")[2]
