"""A head spread over ranks gives what the whole head gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from tests.support import spread_head as cases
from tests.support.ranks import on_ranks

BACKENDS = [name for name in ("eager", "native") if rk.backends()[name] == "ok"]
ONE_PART = ("weight", "bias")


@pytest.fixture(scope="module", params=[2, 3], ids=lambda n: f"{n} ranks")
def spread(request):
    return on_ranks(request.param, cases.every_case, request.param, BACKENDS)


def whole(found: list[dict[str, Tensor]], case: str, name: str) -> Tensor:
    if name in ONE_PART:
        return torch.cat([part[name] for part in found])
    if name == "hidden" and case == "ready logits":  # every rank has its own logits' share
        return torch.stack([part[name] for part in found]).sum(0)
    for part in found[1:]:
        assert torch.equal(part[name], found[0][name]), f"ranks disagree on {name}"
    return found[0][name]


def off(a: Tensor, b: Tensor) -> float:
    distance, size = (a.double() - b.double()).norm(), b.double().norm()
    return float(distance / (size.clamp(min=1.0) if b.dim() == 0 else size.clamp(min=1e-30)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", cases.CASES)
def test_parts_give_what_the_whole_gives(spread, name, dtype, backend):
    found = [rank[name, dtype, backend] for rank in spread]
    alone = cases.compute(name, dtype, backend)
    if name == "sft":
        alone.pop("metric accuracy")  # whether a target is the largest of all, the parts cannot tell
    assert found[0].keys() == alone.keys()
    b = cases.batch()
    largest = float((b["hidden"] @ b["weight"].T).logsumexp(1).max())
    for key, right in alone.items():
        got = whole(found, name, key)
        assert got.dtype == right.dtype
        gradient = key in ("hidden", *ONE_PART)
        # each part's log-sum-exp is rounded to float32; of bfloat16, each part's gradient and their sum
        limit = 1e-14 if dtype == torch.float64 else 2.0**-23 * largest
        if dtype == torch.bfloat16 and gradient:
            limit = 2.0**-7
        if dtype == torch.float32 and key == "loss":
            limit = 1e-6
        assert off(got, right) <= limit, (key, off(got, right), limit)


def _refused(rank: int) -> list[str]:
    group, b = torch.distributed.group.WORLD, cases.batch()
    half = b["weight"][:50]
    attempts = [
        {"tolerance": 0.01},
        {"ref": (b["hidden"], half), "kl": "exact", "kl_coef": 0.1},
        {"vocab_size": 150},
        {"vocab_size": 1},
        {"max_bytes": 10**6 + rank},
    ]
    told = []
    for options in attempts:
        try:
            rk.ppo_loss(b["hidden"], half, b["targets"].clamp(max=90), None, b["advantages"], tp_group=group, **options)
            told.append("")
        except ValueError as error:
            told.append(str(error))
    b["targets"][3] = 100
    try:
        rk.token_stats(b["hidden"], half, b["targets"], tp_group=group)
    except ValueError as error:
        told.append(str(error))
    return told


def test_what_parts_cannot_give_is_refused_on_every_rank():
    first, second = on_ranks(2, _refused)
    assert first == second
    starts = (
        "tolerance: ",
        "tp_group: ",
        "weight: got '50 rows'",
        "vocab_size: ",
        "tp_group: wants the same",
        "targets: ",
    )
    for message, start in zip(first, starts, strict=True):
        assert message.startswith(start), message
    assert "0 to 99" in first[-1]


def _never(rank: int) -> None:
    if rank == 0:
        torch.distributed.barrier()
    else:
        import time

        time.sleep(60)


def test_a_hang_does_not_hang_the_tests():
    with pytest.raises(TimeoutError, match="2 ranks"):
        on_ranks(2, _never, seconds=8)
