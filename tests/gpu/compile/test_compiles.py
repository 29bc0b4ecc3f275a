"""Every kernel in every configuration of the table becomes code for every chip: no spills, within shared memory, on
tensor cores where it multiplies halves. Prints one table of what ptxas made of each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import entries, table
from rlhf_kernels.backends.triton.gradient import calculus
from rlhf_kernels.backends.triton.operands import rows_of
from rlhf_kernels.types import Entries, Grads, Head, Reference, Sinks, Tile
from tests.gpu.compile.aot import CHIPS, SHARED, Launch, Resources, compiled, noted

N, V, H = 32, 8192, 256
MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# Instructions of one logit on sm_90, at most: whatever else a program does is spread over its logits.
SIMPLE, ENTROPY = 16.0, 20.0
LIMITS = json.loads(Path(__file__).with_name("limits.json").read_text())  # of all other configurations, as they are
# kernel, chip -> spilling instructions allowed, with the measurement that justifies them
EXCEPTIONS: dict[tuple[str, str], int] = {}


def tile(dtype: torch.dtype, *, size: int = H, given: bool = False, rich: bool = False, ref: str | None = None) -> Tile:
    """Rows of a head; ``rich`` has all that a head can have, ``given`` are ready logits."""

    def weight() -> torch.Tensor:
        return torch.zeros(V, size, dtype=dtype)

    hidden = torch.zeros(N, V if given else size, dtype=dtype)
    extras = {"bias": torch.zeros(V, dtype=dtype), "softcap": 30.0, "logit_scale": 0.5} if rich else {}
    head = Head(None if given else weight(), **extras)
    reference = None if ref is None else Reference(torch.zeros(N, size, dtype=dtype), Head(weight(), **extras), ref)
    temperature = torch.ones(N) if rich else 0.7
    return Tile(hidden, head, torch.zeros(N, 3 if rich else 1, dtype=torch.int64), temperature, reference)


def train(tile: Tile, everything: bool, entropy: bool = False) -> None:
    """Forward and backward; ``everything``: gradients of all statistics arrive."""
    stats, residual = backend.forward(tile)
    some = torch.zeros(N) if everything else None
    kl = torch.zeros(N) if tile.reference is not None else None
    grads = Grads(stats.logp, torch.zeros(N) if entropy else some, some, some, kl)  # type: ignore[arg-type]
    weight = tile.head.weight
    full = None if weight is None else torch.zeros(weight.shape)
    bias = None if tile.head.bias is None else torch.zeros(V)
    backend.backward(tile, residual, stats, grads, None, Sinks(torch.zeros_like(tile.hidden), full, bias))


def sparse(tile: Tile, everything: bool) -> None:
    """All that a tolerance may launch."""
    stats, residual = backend.forward(tile)
    some = torch.zeros(N) if everything else None
    kl = torch.zeros(N) if tile.reference is not None else None
    grads = Grads(stats.logp, some, some, some, kl)
    terms = calculus(rows_of(tile), residual.kept, residual.kept_ref, stats, residual.norms, grads)
    rows, counts, kept = torch.arange(N), torch.zeros(1, N, dtype=torch.int32), entries.Kept.room(7, ENDS)
    pieces, root, floor = backend.entry(tile.hidden.device).pieces, torch.zeros(()), torch.zeros(N)
    entries.launch(0, terms, V, pieces, rows, root, None, torch.zeros(1), *[None] * 5)
    entries.launch(1, terms, V, pieces, rows, root, floor, None, counts, *[None] * 4)
    entries.launch(2, terms, V, pieces, rows, root, floor, None, counts, counts.long(), *kept[:3])
    weight = tile.head.weight
    assert weight is not None
    bias = None if tile.head.bias is None else torch.zeros(V)
    for fresh in (True, False):
        sinks = Sinks(torch.zeros_like(tile.hidden), torch.zeros(weight.shape), bias, fresh)
        found = Entries(rows, rows, torch.zeros(N), torch.zeros(N), kept)
        backend.multiply(tile, found, sinks)
        backend.backward(tile, residual, stats, grads, rows, sinks)


ENDS = torch.zeros(N + 1, dtype=torch.int64)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], object]] = {
    "score bf16": lambda: backend.score(tile(BF16)),
    "score bf16, odd sizes": lambda: backend.score(tile(BF16, size=100)),
    "train bf16": lambda: train(tile(BF16), False),
    "train bf16, entropy": lambda: train(tile(BF16), False, entropy=True),
    "train bf16, all options": lambda: train(tile(BF16, rich=True), True),
    "train fp16": lambda: train(tile(FP16), True),
    "train fp32": lambda: train(tile(FP32), False),
    "tolerance bf16": lambda: sparse(tile(BF16), False),
    "tolerance bf16, all options": lambda: sparse(tile(BF16, rich=True), True),
    "tolerance fp16": lambda: sparse(tile(FP16), False),
    "tolerance fp32": lambda: sparse(tile(FP32), False),
    "tolerance fp32, all options, kl": lambda: sparse(tile(FP32, rich=True, ref="reverse"), True),
    "kl bf16": lambda: train(tile(BF16, ref="reverse"), False),
    "kl bf16, all options, forward": lambda: train(tile(BF16, rich=True, ref="forward"), True),
    "kl fp32": lambda: train(tile(FP32, ref="reverse"), False),
    "logits bf16": lambda: train(tile(BF16, given=True), True),
    "logits fp32, all options": lambda: train(tile(FP32, given=True, rich=True), True),
}


def configurations(chip: str) -> dict[Launch, str]:
    """What would be launched on a chip, both ways through the head, each binary once, and the first case with it."""
    listed = table.BY_CAPABILITY[CHIPS[chip]]
    found: dict[Launch, str] = {}
    for way in ("strips", "fused"):
        for name, case in CASES.items():
            with pytest.MonkeyPatch.context() as patch:
                here = listed.by(way)
                patch.setattr(backend, "entry", lambda device, here=here: here)
                for launch in noted(case):
                    found.setdefault(launch, f"{name}{', fused' if way == 'fused' else ''}")
    return found


def of_a_logit(launch: Launch, chip: str, found: Resources) -> float | None:
    """Instructions that a thread spends on one logit; None where a kernel has no logits.

    Of a fused head those after the last product count. Of a simple one the block that finds the target's own logit is
    left out: one tile in a thousand enters it.
    """
    options, threads = dict(launch.constants), 32 * dict(launch.options)["num_warps"]
    if launch.name == "head_kernel":
        if options["SIMPLE"]:
            constants = tuple((name, 0 if name == "K" else x) for name, x in launch.constants)
            found = compiled(launch._replace(constants=constants), chip)
        return found.epilogue * threads / (options["BLOCK_N"] * options["BLOCK_V"])
    if launch.name == "anchor_kernel" or not {"ROWS", "BLOCK"} <= options.keys():
        return None
    return found.instructions * threads / (options["ROWS"] * options["BLOCK"] * options.get("STEPS", 1))


def limit(launch: Launch, case: str) -> float | None:
    """Of instructions of a logit; those of a row that is folded once more do not matter."""
    options = dict(launch.constants)
    if options.get("RESCUE"):
        return None
    if launch.name == "strip_kernel" or (launch.name == "head_kernel" and options["SIMPLE"] and options["TMA"]):
        return SIMPLE
    if launch.name == "gradient_kernel" and case == "train bf16, entropy":
        return ENTROPY
    return LIMITS[launch.name][case]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_configuration_fits_the_chip(chip: str, record_property):
    lines, wrong = [], []
    for launch, case in configurations(chip).items():
        r = compiled(launch, chip)
        options = dict(launch.constants)
        half = any(kind in ("*bf16", "*fp16") or "tensordesc" in kind for _, kind in launch.signature[:2])
        multiplies = launch.name == "head_kernel"
        each = of_a_logit(launch, chip, r) if chip == "sm_90" else None
        lines.append(
            f"{chip:7}{launch.name:16}{case:38}{r.registers:4}{r.spills:7}{r.shared / 1024:8.0f}{r.instructions:7}"
            + ("" if each is None else f"{each:9.1f}").rjust(9)
            + "  "
            + " ".join(f"{k} {v}" for k, v in r.products.items())
        )
        allowed = EXCEPTIONS.get((launch.name, chip), 0)
        if r.spills > allowed or (r.stack and not allowed) or r.shared > SHARED[chip]:
            wrong.append(lines[-1])
        most = None if each is None else limit(launch, case)
        if each is not None and most is not None and round(each, 1) > most:
            wrong.append(f"{lines[-1]}: {each:.1f} instructions of a logit, at most {most}")
        if multiplies and half and MMA[chip] not in r.products:
            wrong.append(f"{lines[-1]}: no {MMA[chip]} in {options}")
        if multiplies and not half and options["PRECISION"] == "ieee" and r.products:
            wrong.append(f"{lines[-1]}: tensor cores round float32 to tf32")
    header = (
        f"{'chip':7}{'kernel':16}{'case':38}{'regs':>4}{'spills':>7}{'KiB':>8}{'instr':>7}{'a logit':>9}  tensor cores"
    )
    record_property("table", "\n".join([header, *lines]))
    assert len(lines) > 20
    assert not wrong, "\n".join(["spills, too much shared memory, or no tensor cores:", *wrong])


@pytest.mark.parametrize("way", ["strips", "fused"])
def test_a_vocabulary_that_nothing_divides_spills_nothing(way: str, monkeypatch: pytest.MonkeyPatch):
    """GPT-2 has 50257 columns; stores of single numbers once took registers that a large tile does not have."""
    listed = table.BY_CAPABILITY[CHIPS["sm_90"]].by(way)
    monkeypatch.setattr(backend, "entry", lambda device: listed)
    monkeypatch.setattr(sys.modules[__name__], "V", 50257)
    for name in ("score bf16", "train bf16"):
        for launch in noted(CASES[name]):
            if launch.name in ("head_kernel", "strip_kernel"):
                found = compiled(launch, "sm_90")
                assert found.spills == found.stack == 0, f"{name}: {launch.name}"


def test_a_configuration_that_does_not_fit_is_found():
    """The instrument itself: a tile as large as no register file must show as spills or as an error of the compiler."""
    big = table.Blocks(256, 256, 64, 4, 2)
    listed = table.BY_CAPABILITY[(8, 0)]._replace(half=big).by("fused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "entry", lambda device: listed)
        launch = next(x for x in noted(lambda: backend.score(tile(BF16))) if x.name == "head_kernel")
    assert compiled(launch, "sm_80").spills > 0
