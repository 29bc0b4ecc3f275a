"""Peak memory of one step beyond its inputs and gradients, in a process of its own (Linux).

python -m benchmarks.memory BATCH.pt OP CONTENDER     # prints bytes
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import SHAPES, Batch, draw, for_op
from benchmarks.contenders import contenders

ROOT = Path(__file__).parents[1]


def _kilobytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def _forget_the_past() -> None:
    """Give freed memory back and reset the high-water mark, so that making the inputs does not count."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def _extra_bytes(path: str, op: str, name: str, max_bytes: int | None) -> int:
    batch = Batch.load(path)
    contender = next(c for c in contenders(op, max_bytes) if c.name == name)
    warm = batch if contender.compiles else for_op(op, *draw(SHAPES["tiny"], batch.hidden.dtype))[0]
    contender.build(warm)()
    step = contender.build(batch)
    _forget_the_past()
    before = _kilobytes("VmRSS")
    result = step()
    gradients = [g for g in (result.grad_hidden, result.grad_weight) if g is not None]
    return (_kilobytes("VmHWM") - before) * 1024 - sum(g.numel() * g.element_size() for g in gradients)


def extra_bytes(path: str, op: str, name: str, threads: int, max_bytes: int | None = None) -> int:
    """Run ``name`` once on a saved batch elsewhere; what it needed beyond inputs and gradients, in bytes.

    Raises:
        RuntimeError: the other process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "benchmarks.memory", path, op, name, "--threads", str(threads)]
    command += [] if max_bytes is None else ["--max-bytes", str(max_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch")
    parser.add_argument("op")
    parser.add_argument("contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-bytes", type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(_extra_bytes(given.batch, given.op, given.contender, given.max_bytes)))


if __name__ == "__main__":
    main()
