"""Files of a checkpoint: JSON and safetensors, summed while they are written, and synced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Writes JSON; the file is synced.

    Returns:
        ``bytes`` and ``sha256`` of the file.
    """
    return _write(path, [(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes tensors one after the other, so that no second copy of them is ever in memory.

    Args:
        path: The file. It is synced.
        tensors: Of any device and dtype that safetensors knows.

    Returns:
        ``bytes`` and ``sha256`` of the file.
    """
    import torch

    # Wide elements first: every tensor is then aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    at = 0
    for name, x in ordered:
        size = x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[str(x.dtype)], "shape": list(x.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterable[Any]:
        yield len(head).to_bytes(8, "little") + head
        for _, x in ordered:
            yield x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return _write(path, chunks())


def _write(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Every byte of a checkpoint goes through here: written, summed, synced."""
    total, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            total += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": digest.hexdigest()}
