"""Values that no loss can be made of: each is refused by name where it counts, and never matters where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import rlhf_kernels as rk

N, H, V, S = 6, 4, 9, 4
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
CU = torch.tensor([0, 1, 3, 5, 6])
PAIRED = torch.tensor([True, False, True, False])
KEPT = torch.tensor([True, True, False, True, True, False])  # the last sequence has no token that counts
TARGETS = torch.tensor([1, 2, -100, 3, 8, -100])


def head() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {"hidden": torch.randn(N, H, generator=g), "weight": torch.randn(V, H, generator=g), "targets": TARGETS}


def per_token() -> Tensor:
    return torch.linspace(-2.0, -1.0, N)


def policy() -> dict[str, Any]:
    return {
        **head(), "old_logp": per_token(), "advantages": per_token().roll(1), "ref_logp": per_token().roll(2),
        "token_weight": per_token().abs(), "kl_coef": 0.1,
    }  # fmt: skip


def preference(**more: Any) -> dict[str, Any]:
    return {**head(), "cu_seqlens": CU, **more}


def scored(**more: Any) -> dict[str, Any]:
    return {"scores": per_token(), **more}


KTO = {"ref_logp": per_token(), "desirable": PAIRED, "kl": torch.tensor(0.1)}
# the call; its arguments; of each one that is looked at, a place that counts and one that does not, if there is one
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[int, int | None]]]] = {
    "ppo_loss": (rk.ppo_loss, policy(), dict.fromkeys(("old_logp", "advantages", "ref_logp", "token_weight"), (1, 2))),
    "grpo_loss": (rk.grpo_loss, policy(), dict.fromkeys(("old_logp", "advantages", "ref_logp"), (4, 5))),
    "ppo_loss per sequence": (
        rk.ppo_loss, {**policy(), "advantages": torch.ones(S), "cu_seqlens": CU}, {"advantages": (2, 3)},
    ),
    "sft_loss": (rk.sft_loss, {**head(), "token_weight": torch.ones(N)}, {"token_weight": (0, 5)}),
    "dpo_loss": (
        rk.dpo_loss, preference(ref_logp=per_token(), margin=torch.ones(2)), {"ref_logp": (3, 2), "margin": (0, 1)},
    ),
    "dpo_loss per sequence": (rk.dpo_loss, preference(ref_logp=torch.ones(S)), {"ref_logp": (1, 3)}),
    "ipo_loss": (rk.ipo_loss, preference(ref_logp=torch.ones(S)), {"ref_logp": (2, 3)}),
    "kto_loss": (rk.kto_loss, preference(**KTO), {"ref_logp": (0, 5)}),
    "simpo_loss": (rk.simpo_loss, preference(margin=torch.ones(2)), {"margin": (0, 1)}),
    "value_loss": (
        rk.value_loss, {"values": per_token(), "returns": per_token().roll(1), "old_values": per_token(), "mask": KEPT},
        dict.fromkeys(("values", "returns", "old_values"), (0, 2)),
    ),
    "bradley_terry_loss": (
        rk.bradley_terry_loss, scored(margin=torch.ones(3)), {"scores": (4, None), "margin": (1, None)},
    ),
    "bradley_terry_loss with ties": (
        rk.bradley_terry_loss, scored(ranks=torch.tensor([1, 1, 1, 2, 2, 1]), center_coef=0.1), {"scores": (2, 0)},
    ),
    "plackett_luce_loss": (
        rk.plackett_luce_loss, scored(ranks=torch.arange(6.0), groups=torch.tensor([0, 1, 1, 1, 2, 2])),
        {"scores": (1, 0)},
    ),
    "infonce_loss": (rk.infonce_loss, scored(positive=KEPT, groups=2), {"scores": (2, 0)}),
    "gae": (
        rk.gae, {"rewards": per_token().where(KEPT, 0.0), "values": per_token(), "cu_seqlens": CU, "mask": KEPT,
                 "bootstrap": torch.ones(S)},
        {"rewards": (0, None), "values": (1, 2), "bootstrap": (0, 3)},
    ),
    "shaped_rewards": (
        rk.shaped_rewards, {"scores": torch.ones(S), "logp": per_token(), "ref_logp": per_token(), "cu_seqlens": CU,
                            "beta": torch.tensor(0.1), "mask": KEPT},
        {"scores": (0, 3), "logp": (1, 2), "ref_logp": (4, 5)},
    ),
    "whiten": (rk.whiten, {"x": per_token(), "mask": KEPT}, {"x": (0, 2)}),
    "group_advantages": (rk.group_advantages, scored(groups=2), {"scores": (3, None)}),
}  # fmt: skip
EACH = [(case, name) for case, (_, _, places) in CASES.items() for name in places]


def numbers(found: Any) -> list[Tensor]:
    """Loss, metrics and gradients, or whatever a function gives."""
    loss = getattr(found, "loss", None)
    if loss is None:
        return list(found) if isinstance(found, tuple) else [found]
    return [loss, *found.metrics.values()]


def poisoned(case: str, name: str, place: int, bad: float) -> tuple[Callable[..., Any], dict[str, Any]]:
    fn, arguments, _ = CASES[case]
    x = arguments[name].clone()
    x[place] = bad
    return fn, {**arguments, name: x}


@BAD
@pytest.mark.parametrize(("case", "name"), EACH)
def test_where_it_counts_it_is_refused_by_name(case, name, bad):
    place = CASES[case][2][name][0]
    fn, arguments = poisoned(case, name, place, bad)
    with pytest.raises(ValueError, match=rf"^{name}: got {bad} at {place}, wants finite numbers$"):
        fn(**arguments)


@BAD
@pytest.mark.parametrize(("case", "name"), [(c, n) for c, n in EACH if CASES[c][2][n][1] is not None])
def test_where_it_does_not_count_it_never_matters(case, name, bad):
    """Neither in the loss nor in a gradient, where a NaN would come back as NaN times zero."""
    fn, arguments = poisoned(case, name, CASES[case][2][name][1], bad)

    def all_of_it(given: dict[str, Any]) -> list[Tensor]:
        leaves = {n: given[n].clone().requires_grad_() for n in ("hidden", "weight", "values", "scores") if n in given}
        found = fn(**{**given, **leaves})
        if not hasattr(found, "loss"):
            return numbers(found)
        found.loss.backward()
        return [*numbers(found), *(x.grad for x in leaves.values())]

    for ours, expected in zip(all_of_it(arguments), all_of_it(CASES[case][1]), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_good_passes(case):
    """Otherwise the first test would prove nothing."""
    fn, arguments, _ = CASES[case]
    assert all(x.isfinite().all() for x in numbers(fn(**arguments)))


COUNTED = {
    "ppo_loss": ("num_tokens", {}),
    "ppo_loss by sequence": ("num_sequences", {"reduction": "sequence_sum", "cu_seqlens": CU}),
    "sft_loss": ("num_tokens", {}),
    "dpo_loss": ("num_pairs", {}),
    "kto_loss": ("num_sequences", {}),
    "value_loss": ("num_tokens", {}),
    "bradley_terry_loss": ("num_groups", {}),
    "infonce_loss": ("num_groups", {}),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -3.0])
@pytest.mark.parametrize("case", list(COUNTED))
def test_a_broken_denominator_does_not_end_the_learning_unseen(case, bad):
    """As the result of a broken all-reduce; with ``checks=False`` it shows in the loss, unless it is infinite."""
    fn, arguments, _ = CASES[case.removesuffix(" by sequence")]
    name, more = COUNTED[case]
    arguments = {**arguments, **more}
    for given in (torch.tensor(bad), torch.tensor(bad, dtype=torch.float64), bad):
        with pytest.raises(ValueError, match=rf"^{name}: got {bad}, wants a finite number, zero or more"):
            fn(**arguments, **{name: given})
    loss = fn(**arguments, **{name: torch.tensor(bad)}, checks=False).loss
    assert math.isinf(bad) or loss.isnan() or loss != 0
    assert fn(**arguments, **{name: torch.tensor(0)}).loss == 0


@BAD
def test_kto_and_shaped_rewards_of_a_broken_number(bad):
    fn, arguments, _ = CASES["kto_loss"]
    for given in (bad, torch.tensor(bad)):
        with pytest.raises(ValueError, match=r"^kl: "):
            fn(**{**arguments, "kl": given})
        with pytest.raises(ValueError, match=r"^beta: "):
            rk.shaped_rewards(**{**CASES["shaped_rewards"][1], "beta": given})


@BAD
@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_ready_logits_and_references(backend, row, max_bytes, bad):
    """Wherever the row is, and however many pieces the rows are cut into."""
    x = head()
    logits = (x["hidden"] @ x["weight"].T).clone()
    logits[row, 2] = bad
    if bad == -math.inf:  # a token that may not come next
        assert rk.token_stats_from_logits(logits, TARGETS, max_bytes=max_bytes, backend=backend).lse.isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"^logits: "):
            rk.token_stats_from_logits(logits, TARGETS, max_bytes=max_bytes, backend=backend)
    ref_hidden = x["hidden"].clone()
    ref_hidden[row, 1] = bad
    with pytest.raises(ValueError, match=r"^ref"):
        rk.kl_divergence(**x, ref_hidden=ref_hidden, ref_weight=x["weight"], max_bytes=max_bytes, backend=backend)


def strange(x: Tensor) -> dict[str, Tensor]:
    made = {"coo": x.to_sparse(), "nested": torch.nested.nested_tensor([x]), "meta": x.to("meta")}
    if x.dim():
        made |= {"jagged": torch.nested.nested_tensor([x], layout=torch.jagged)}
    if x.dim() == 2:
        made |= {"csr": x.to_sparse_csr(), "mkldnn": x.float().to_mkldnn()}
    if x.dtype == torch.float32:
        made |= {"negated": torch._neg_view(x), "of a library": FakeTensorMode().from_tensor(x)}
        made |= {"float8": x.to(torch.float8_e4m3fn), "complex": x.to(torch.complex64)}
    return made


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
@pytest.mark.parametrize("case", list(CASES))
def test_tensors_of_other_kinds_are_refused_by_name(case):
    fn, arguments, _ = CASES[case]
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        for other in strange(x).values():
            with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
                fn(**{**arguments, name: other})


@pytest.mark.parametrize("case", ["ppo_loss", "dpo_loss", "kto_loss", "sft_loss"])
@pytest.mark.parametrize("other", [None, "weight", 3, 2**70, [1.0], object()], ids=lambda x: type(x).__name__)
def test_what_is_no_tensor_is_refused_by_name(case, other):
    fn, arguments, _ = CASES[case]
    for name in ("hidden", "weight", "targets"):
        with pytest.raises(TypeError, match=rf"^{name}: got {type(other).__name__}, wants "):
            fn(**{**arguments, name: other})


@pytest.mark.parametrize("name", ["ignore_index", "max_bytes", "max_targets", "vocab_size"])
@pytest.mark.parametrize("other", [1.5, "4", True, 2**70, torch.tensor(4)], ids=str)
def test_what_is_no_whole_number_is_refused_by_name(name, other):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rk.sft_loss(**head(), **{name: other})


@pytest.mark.parametrize("name", ["softcap", "logit_scale", "temperature", "tolerance", "loss_scale", "z_loss"])
@pytest.mark.parametrize("other", [2**70, math.inf, math.nan, "1", True, [1.0]], ids=str)
def test_what_is_no_finite_number_is_refused_by_name(name, other):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rk.sft_loss(**head(), **{name: other})


@pytest.mark.parametrize("case", list(CASES))
def test_a_rollout_may_be_made_for_inference(case):
    """Autograd saves none of it, or a copy."""
    fn, arguments, _ = CASES[case]
    leaves = {n: arguments[n].clone().requires_grad_() for n in ("hidden", "weight", "values") if n in arguments}
    with torch.inference_mode():
        made = {n: x.clone() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    found = fn(**made | leaves)
    if leaves and hasattr(found, "loss"):
        found.loss.backward()
    for ours, expected in zip(numbers(found), numbers(fn(**arguments)), strict=True):
        assert torch.equal(ours, expected)


def test_hidden_states_made_for_inference_cannot_be_trained_on():
    x = head()
    with torch.inference_mode():
        hidden = x["hidden"] * 1
    assert rk.sft_loss(hidden, x["weight"], TARGETS).loss.isfinite()
    with pytest.raises(ValueError, match=r"^hidden: .* outside torch\.inference_mode"):
        rk.sft_loss(hidden, x["weight"].requires_grad_(), TARGETS)


def test_ranks_may_be_infinite_and_no_nan():
    """Only their order matters, in which infinity has a place."""
    arguments = CASES["plackett_luce_loss"][1]
    ranks = arguments["ranks"].clone()
    ranks[3] = math.inf
    found = rk.plackett_luce_loss(**{**arguments, "ranks": ranks}).loss
    ranks[3] = 9.0
    assert torch.equal(found, rk.plackett_luce_loss(**{**arguments, "ranks": ranks}).loss)
    ranks[3] = math.nan
    with pytest.raises(ValueError, match=r"^ranks: got NaN"):
        rk.plackett_luce_loss(**{**arguments, "ranks": ranks})


@pytest.mark.parametrize("number", [np.int64(5), np.float32(5.0), 5.0], ids=lambda x: type(x).__name__)
def test_a_denominator_may_be_a_number_of_numpy(number):
    found, expected = (rk.sft_loss(**head(), num_tokens=n).loss for n in (number, 5))
    assert torch.equal(found, expected)
    for bad in (np.float32("nan"), np.int64(-1), np.ones(2)):
        with pytest.raises((ValueError, TypeError), match=r"^num_tokens: "):
            rk.sft_loss(**head(), num_tokens=bad)
