"""Built from ``csrc/cuda`` where there is an nvcc. Tensors arrive as addresses, a stream as a number."""

GAE_SCRATCH_BYTES: int

def devices() -> int: ...
def gae(
    wide: bool, rewards: int, values: int, cu_seqlens: int, mask: int, bootstrap: int, advantages: int, returns: int,
    scratch: int, rows: int, sequences: int, gamma: float, lam: float, eps: float, whiten: bool, device: int,
    stream: int, /,
) -> None: ...  # fmt: skip
