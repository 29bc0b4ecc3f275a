"""Heads with a NaN or an infinity in them are refused by name, and good ones are not read for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk

INF, NAN = math.inf, math.nan
TARGETS = torch.tensor([1, 2, 3, -100, 4])


def problem(**bad: tuple[int, int, float]) -> dict[str, Tensor]:
    """A head and a reference; ``name=(row, column, value)`` puts one number into one of them."""
    draw = torch.Generator().manual_seed(5)
    made = {name: torch.randn(*size, generator=draw) for name, size in
            {"hidden": (5, 8), "weight": (11, 8), "ref_hidden": (5, 8), "ref_weight": (11, 8)}.items()}  # fmt: skip
    for name, (row, column, value) in bad.items():
        made[name][row, column] = value
    return made


def mask(value: float = -INF, **at: float) -> Tensor:
    """A bias that says of the last two tokens that they cannot come next; ``_3=x`` puts x at 3."""
    bias = torch.zeros(11)
    bias[9:] = value
    for name, x in at.items():
        bias[int(name[1:])] = x
    return bias


def kl(p: dict[str, Tensor], **head: Any) -> Tensor:
    return rk.kl_divergence(p["hidden"], p["weight"], p["ref_hidden"], p["ref_weight"], TARGETS, **head)


def ppo(p: dict[str, Tensor], **head: Any) -> Tensor:
    ref = (p["ref_hidden"], p["ref_weight"])
    rollout = torch.full((5,), -2.0), torch.ones(5)
    return rk.ppo_loss(
        p["hidden"], p["weight"], TARGETS, *rollout, ref=ref, kl="exact", kl_coef=0.1, **head
    ).loss  # fmt: skip


OVERFLOW = problem() | {"ref_hidden": torch.full((5, 8), 1e30), "ref_weight": torch.full((11, 8), 1e30)}
BOTH = {"bias": mask(), "ref_head": {"bias": mask()}}
REFERENCES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "a bias of NaN": (problem(), {"ref_head": {"bias": mask(_2=NAN)}}, "ref_head: bias: "),
    "a bias of infinity": (problem(), {"ref_head": {"bias": mask(_2=INF)}}, "ref_head: bias: "),
    "hidden, beside masks": (problem(ref_hidden=(1, 1, NAN)), BOTH, r"ref(_hidden|\[0\]): "),
    "weight, beside masks": (problem(ref_weight=(1, 1, NAN)), BOTH, r"ref(_weight|\[1\]): "),
    "logits that overflow": (OVERFLOW, {}, r"ref(_hidden|\[0\]), ref(_weight|\[1\]): the logits overflow"),
}


@pytest.mark.parametrize("loss", [kl, ppo])
@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_that_is_not_finite_is_named(backend: str, loss: Callable[..., Tensor], case: str) -> None:
    p, head, named = REFERENCES[case]
    with pytest.raises(ValueError, match=rf"^{named}"):
        loss(p, **head, backend=backend)


def test_what_a_reference_holds_in_ignored_rows_never_matters(backend: str) -> None:
    """Also where somebody is looked for: the policy's mask makes this divergence infinite, and nobody is to blame."""
    p = problem(ref_hidden=(3, 0, NAN))
    found = kl(p, direction="forward", bias=mask(), ref_head={"bias": None}, backend=backend)
    assert torch.equal(found, torch.tensor([INF, INF, INF, 0.0, INF]))
    assert kl(p, backend=backend).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_token_that_the_reference_cannot_say_makes_an_infinite_divergence(backend: str, dtype: torch.dtype) -> None:
    p = {name: x.to(dtype) for name, x in problem().items()}
    bias = mask().to(dtype)
    found = kl(p, bias=torch.zeros_like(bias), ref_head={"bias": bias}, backend=backend)
    assert found[TARGETS >= 0].isposinf().all()


@pytest.mark.parametrize("given", [{"softcap": 5.0}, {"bias": mask()}], ids=["softcap", "mask"])
def test_an_infinite_logit_is_its_limit_and_has_no_gradient(backend: str, given: dict[str, Any]) -> None:
    """A token at its softcap, or one that cannot come next; but zero times an infinite weight is a NaN."""
    p, softcap = problem(weight=(10, 0, -INF)), given.get("softcap")
    p["hidden"] = p["hidden"].abs()
    z = p["hidden"].double() @ p["weight"].double().T
    z = z if softcap is None else softcap * (z / softcap).tanh()
    want = (z + given.get("bias", torch.zeros(11))).log_softmax(1)[torch.arange(5), TARGETS.clamp(0)]
    with torch.no_grad():
        found = rk.token_stats(p["hidden"], p["weight"], TARGETS, **given, backend=backend).logp
    assert torch.allclose(found[TARGETS >= 0].double(), want[TARGETS >= 0], atol=1e-5)
    with pytest.raises(ValueError, match=r"^weight: got NaN or infinity"):
        rk.sft_loss(p["hidden"].requires_grad_(), p["weight"], TARGETS, **given, backend=backend)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 2e38), (torch.bfloat16, 2e38), (torch.float16, 6e4)])
def test_finite_hidden_states_may_have_a_sum_that_overflows(backend: str, dtype: torch.dtype, large: float) -> None:
    hidden, weight = torch.full((4, 16), large, dtype=dtype), torch.eye(9, 16, dtype=dtype) / large
    assert rk.token_stats(hidden, weight, torch.arange(4), backend=backend).logp.isfinite().all()
    hidden[2, 3] = INF
    with pytest.raises(ValueError, match=r"^hidden: "):
        rk.token_stats(hidden, weight, torch.arange(4), backend=backend)


SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "no column": ((3, 0), (4, 0), (3,), "weight"),
    "no row": ((3, 2), (0, 2), (3,), "weight"),
    "no id": ((3, 2), (4, 2), (3, 0), "token_ids"),
}


@pytest.mark.parametrize("case", SIZES)
def test_nothing_to_compute_with_is_refused_by_name(case: str) -> None:
    hidden, weight, ids, named = SIZES[case]
    fn = rk.token_logps if len(ids) == 2 else rk.token_stats
    with pytest.raises(ValueError, match=rf"^{named}: "):
        fn(torch.zeros(hidden), torch.zeros(weight), torch.zeros(ids, dtype=torch.long))


@pytest.mark.parametrize("way", ["the weight itself", "one row for all", "one column for all"])
def test_a_buffer_for_gradients_has_memory_of_its_own(way: str) -> None:
    p = problem()
    weight, before = p["weight"].requires_grad_(), p["weight"].detach().clone()
    buffers = {
        "the weight itself": weight.detach(),
        "one row for all": torch.zeros(1, 8).expand(11, 8),
        "one column for all": torch.zeros(11, 1).expand(11, 8),
    }
    with pytest.raises(ValueError, match=r"^weight_grad: .* shares no memory"):
        rk.sft_loss(p["hidden"], weight, TARGETS, weight_grad=buffers[way])
    assert torch.equal(weight, before)


class Seen(TorchDispatchMode):
    """What operations make and read: the largest tensor made, views left out, and who has read all of ``watched``."""

    def __init__(self, watched: Tensor):
        super().__init__()
        self.elements, self.readers, self.watched = 0, set[str](), watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in {
            x.untyped_storage().data_ptr() for x in given
        }:
            self.elements = max(self.elements, out.numel())
            if any(x.untyped_storage().data_ptr() == self.watched.untyped_storage().data_ptr() for x in given):
                self.readers.add(func.name())
        return out


OPTIONS = ["plain", "softcap", "mask of -inf", "mask of the least number"]


def options_of(reason: str, dtype: torch.dtype, vocab: int) -> dict[str, Any]:
    if reason == "softcap":
        return {"softcap": 30.0}
    if not reason.startswith("mask"):
        return {}
    bias = torch.zeros(vocab, dtype=dtype)
    bias[1:] = -INF if reason == "mask of -inf" else torch.finfo(dtype).min
    return {"bias": bias}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reason", [*OPTIONS, "NaN"])
def test_to_look_for_bad_values_costs_no_memory(backend: str, dtype: torch.dtype, reason: str) -> None:
    """A mask or a copy as large as the head would not fit any ``max_bytes``."""
    hidden, weight = torch.ones(2, 64, dtype=dtype), torch.ones(40_000, 64, dtype=dtype)
    if reason == "NaN":
        weight[3, 3] = NAN
    refused = pytest.raises(ValueError, match=r"^weight: ") if reason == "NaN" else nullcontext()
    with Seen(weight) as seen, torch.no_grad(), refused:
        rk.token_stats(hidden, weight, torch.tensor([0, 0]), backend=backend, **options_of(reason, dtype, 40_000))
    assert 0 < seen.elements <= weight.numel() // 2


@pytest.mark.parametrize("reason", OPTIONS)
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_a_good_head_is_read_for_its_products_only(backend: str, reason: str, max_bytes: int | None) -> None:
    """To look through it would take as long as a product of a few rows."""
    hidden, weight = torch.ones(4, 8).requires_grad_(), torch.linspace(-1, 1, 800).view(100, 8).requires_grad_()
    targets, given = torch.tensor([0, -100, 0, 0]), options_of(reason, torch.float32, 100)
    names = []
    for checks in (True, False):
        with Seen(weight) as seen:
            rk.sft_loss(hidden, weight, targets, checks=checks, backend=backend, max_bytes=max_bytes, **given)
        names.append(seen.readers)
    assert names[0] == names[1]


def test_only_hidden_states_that_count_are_looked_at() -> None:
    hidden, targets = torch.ones(4096, 8), torch.full((4096,), -100)
    targets[::512] = 1
    with Seen(hidden) as seen, torch.no_grad():
        rk.token_stats(hidden, torch.ones(5, 8), targets)
    assert seen.readers <= {"aten::index.Tensor", "aten::index_select"}
