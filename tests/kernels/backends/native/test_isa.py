"""RLHF_KERNELS_ISA caps the instruction set of the native backend, and Python can ask which one is in force."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_C = pytest.importorskip("rlhf_kernels._C", reason="the extension is not built")

NAMES = ["scalar", "avx2", "avx512", "avx512bf16"]
# The extension alone, which takes a tenth of the time of torch.
ASK = """
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {file!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
try:
    print(*_C.isas(), _C.isa(), _C.has_head())
except ValueError as error:
    print(error)
"""


def said(cap: str | None, program: str = ASK.format(file=_C.__file__)) -> str:
    """What a process of its own prints: the variable is read once."""
    environment = {name: x for name, x in os.environ.items() if name != "RLHF_KERNELS_ISA"}
    environment |= {} if cap is None else {"RLHF_KERNELS_ISA": cap}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("cap", [*NAMES, "", None])
def test_nothing_above_the_cap_is_used(cap: str | None):
    everything, allowed = said(None).split()[:-2], NAMES[: NAMES.index(cap) + 1] if cap else NAMES
    usable = [name for name in everything if name in allowed]
    whole_head = usable[-1].startswith("avx512")
    assert everything == NAMES[: len(everything)]
    assert said(cap) == f"{' '.join(usable)} {usable[-1]} {whole_head}"


def test_what_is_in_force_here():
    """This very process, which is to be capped when ``make test-isa`` says so."""
    cap = os.environ.get("RLHF_KERNELS_ISA") or NAMES[-1]
    assert set(_C.isas()) <= set(NAMES[: NAMES.index(cap) + 1])
    assert _C.isa() == _C.isas()[-1]


@pytest.mark.parametrize("name", ["sse9", "AVX2", " avx2", "avx512f"])
def test_names_that_are_none(name: str):
    assert said(name) == f"RLHF_KERNELS_ISA: got '{name}', wants 'scalar', 'avx2', 'avx512' or 'avx512bf16'"


def test_a_loss_says_so_before_any_work():
    """It neither runs on another backend nor takes the name for the best set."""
    program = (
        "import torch, rlhf_kernels as rk\n"
        "try: rk.sft_loss(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 2]))\n"
        "except ValueError as error: print(error)"
    )
    assert said("sse9", program).startswith("RLHF_KERNELS_ISA: got 'sse9', wants 'scalar', ")
