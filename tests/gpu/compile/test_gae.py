"""The kernels of packed advantages and rewards become code for every chip, as launched there, and nothing spills."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rlhf_kernels.backends import triton_gae, triton_rewards
from tests.gpu.compile.aot import CHIPS, SHARED, Launch, compiled, noted

# few programs; more than the smaller vector of carries holds; several tiles to a program
SIZES = FEW, MANY, TILED = 1000, triton_gae.BLOCK * 65, triton_gae.BLOCK * triton_gae.PROGRAMS * 2
Calls = dict[str, list[Launch]]


def gae(dtype: torch.dtype, rows: int, options: bool, whiten: bool, sequences: int = 3) -> list[Launch]:
    x, cu_seqlens = torch.zeros(rows, dtype=dtype), torch.zeros(sequences + 1, dtype=torch.int64)
    mask, after = (torch.zeros(rows, dtype=torch.bool), x[:sequences].clone()) if options else (None, None)
    args = x, x, cu_seqlens, mask, after, 0.99, 0.95, 1e-8 if whiten else None
    return noted(lambda: triton_gae._launch(*args))


def rewards(dtype: torch.dtype, rows: int, kl: str, clip: float | None, tensor: bool) -> list[Launch]:
    x, cu_seqlens = torch.zeros(rows, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    mask, beta = torch.zeros(rows, dtype=torch.bool), torch.tensor(0.1) if tensor else 0.1
    return noted(lambda: triton_rewards.shaped_rewards(x[:3].clone(), x, x, cu_seqlens, mask, beta, kl, clip))


def calls() -> Calls:
    found = {f"all options, {rows} rows": gae(torch.float32, rows, True, True) for rows in SIZES}
    found |= {f"float64, {rows} rows": gae(torch.float64, rows, True, True) for rows in (FEW, TILED)}
    return found | {f"k3, {rows} rows": rewards(torch.float32, rows, "k3", 1.0, True) for rows in (FEW, TILED)}


def more_calls() -> Calls:
    """Options only take away from those above; looked at on one chip."""
    found = {}
    for options, whiten in product((True, False), (True, False)):
        what = "mask, bootstrap" * options + ", whitened" * whiten or "nothing"
        found[what] = gae(torch.float32, FEW, options, whiten)
    found["one sequence"] = gae(torch.float32, MANY, False, False, sequences=1)  # its number is specialised
    found["k1"], found["k2"] = (rewards(torch.float32, FEW, kl, None, False) for kl in ("k1", "k2"))
    found["k3 in float64"] = rewards(torch.float64, FEW, "k3", 1.0, True)
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_every_launch_fits_the_chip(chip: str, record_property):
    lines, wrong, seen = [], [], set()
    for what, launches in (calls() | (more_calls() if chip == "sm_90" else {})).items():
        for launch in launches:
            if launch in seen:
                continue
            seen.add(launch)
            r = compiled(launch, chip)
            lines.append(
                f"{chip:7}{launch.name:22}{what:27}{r.registers:5}{r.spills:7}{r.shared / 1024:6.1f}{r.instructions:7}"
            )
            if r.spills or r.stack or r.shared > SHARED[chip]:
                wrong.append(lines[-1])
    header = f"{'chip':7}{'kernel':22}{'call':27}{'regs':>5}{'spills':>7}{'KiB':>6}{'instr':>7}"
    record_property("table", "\n".join([header, *lines]))
    assert len(lines) >= 14
    assert not wrong, "\n".join(["spills, or too much shared memory:", *wrong])
