"""Bad input: one error that names the argument, before any work starts; or a defined result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rlhf_kernels as rk

N, H, V = 6, 4, 9
NAN = float("nan")


def good() -> dict[str, Any]:
    return {
        "hidden": torch.randn(N, H),
        "weight": torch.randn(V, H),
        "targets": torch.tensor([1, 2, -100, 3, 8, 0]),
        "cu_seqlens": torch.tensor([0, 2, 3, 5, 6]),
        "old_logp": torch.full((N,), -2.0),
        "advantages": torch.ones(N),
        "ref_logp": torch.full((N,), -2.0),
    }


def token_stats(x, **kwargs):
    return rk.token_stats(x["hidden"], x["weight"], x["targets"], **kwargs)


def sft(x, **kwargs):
    return rk.sft_loss(x["hidden"], x["weight"], x["targets"], **kwargs)


def ppo(x, **kwargs):
    return rk.ppo_loss(x["hidden"], x["weight"], x["targets"], x["old_logp"], x["advantages"], **kwargs)


def dpo(x, **kwargs):
    return rk.dpo_loss(x["hidden"], x["weight"], x["targets"], x["cu_seqlens"], x["ref_logp"], **kwargs)


def fused(x, **kwargs):
    return rk.fused_loss(x["hidden"], x["weight"], x["targets"], lambda s, cu, *rest: (s.logp.sum(), {}), **kwargs)


def poison(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(x: dict[str, Any]) -> None:
        x[name][index] = value

    return change


def replace(**new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda x: x.update(new)


OTHER = torch.ones(V + 1, 2)  # a head of another vocabulary

# what is called, what is broken, more arguments, the argument that the message names
BAD: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], None] | None, dict[str, Any], str]] = {
    "hidden-width": (token_stats, replace(hidden=torch.randn(N, H + 1)), {}, "hidden|weight"),
    "hidden-rows": (token_stats, replace(hidden=torch.randn(N + 1, H)), {}, "hidden|targets"),
    "hidden-dtype": (token_stats, replace(hidden=torch.randn(N, H).bfloat16()), {}, "hidden|weight"),
    "hidden-integers": (token_stats, replace(hidden=torch.ones(N, H, dtype=torch.long)), {}, "hidden"),
    "hidden-device": (token_stats, replace(hidden=torch.randn(N, H, device="meta")), {}, "hidden|device"),
    "hidden-scalar": (token_stats, replace(hidden=torch.tensor(1.0)), {}, "hidden"),
    "hidden-none": (token_stats, replace(hidden=None), {}, "hidden"),
    "hidden-nan": (token_stats, poison("hidden", (0, 1), NAN), {}, "hidden"),
    "hidden-inf": (token_stats, poison("hidden", (0, 1), float("inf")), {}, "hidden"),
    "weight-nan": (token_stats, poison("weight", (5, 1), NAN), {}, "weight"),
    "weight-shape": (token_stats, replace(weight=torch.randn(V)), {}, "weight"),
    "weight-device": (token_stats, replace(weight=torch.randn(V, H, device="meta")), {}, "weight|device"),
    "targets-float": (token_stats, replace(targets=torch.ones(N)), {}, "targets"),
    "targets-too-large": (token_stats, poison("targets", 3, V), {}, "targets"),
    "targets-negative": (token_stats, poison("targets", 3, -1), {}, "targets"),
    "targets-in-padding": (token_stats, None, {"vocab_size": 8}, "targets"),
    "targets-of-sft": (sft, poison("targets", 3, V), {}, "targets"),
    "targets-of-ppo": (ppo, poison("targets", 3, V + 100), {}, "targets"),
    "vocab-size": (token_stats, None, {"vocab_size": V + 1}, "vocab_size"),
    "vocab-size-zero": (token_stats, None, {"vocab_size": 0}, "vocab_size"),
    "bias-shape": (token_stats, None, {"bias": torch.zeros(V + 1)}, "bias"),
    "bias-nan": (token_stats, None, {"bias": torch.full((V,), NAN)}, "bias"),
    "temperature-zero": (token_stats, None, {"temperature": 0.0}, "temperature"),
    "temperature-negative": (ppo, None, {"temperature": -1.0}, "temperature"),
    "temperature-nan": (token_stats, None, {"temperature": NAN}, "temperature"),
    "temperature-tensor": (token_stats, None, {"temperature": torch.zeros(N)}, "temperature"),
    "temperature-shape": (token_stats, None, {"temperature": torch.ones(N + 1)}, "temperature"),
    "softcap": (token_stats, None, {"softcap": -30.0}, "softcap"),
    "softcap-zero": (token_stats, None, {"softcap": 0.0}, "softcap"),
    "logit-scale": (token_stats, None, {"logit_scale": NAN}, "logit_scale"),
    "backend": (token_stats, None, {"backend": "tritton"}, "backend"),
    "max-bytes": (token_stats, None, {"max_bytes": -1}, "max_bytes"),
    "weight-grad-dtype": (token_stats, None, {"weight_grad": torch.zeros(V, H).bfloat16()}, "weight_grad"),
    "weight-grad-shape": (token_stats, None, {"weight_grad": torch.zeros(V, H + 1)}, "weight_grad"),
    "old-logp-shape": (ppo, replace(old_logp=torch.zeros(N - 1)), {}, "old_logp"),
    "old-logp-integers": (ppo, replace(old_logp=torch.ones(N, dtype=torch.long)), {}, "old_logp"),
    "advantages-shape": (ppo, replace(advantages=torch.zeros(N + 2)), {}, "advantages"),
    "clip-negative": (ppo, None, {"clip": (-0.1, 0.2)}, "clip"),
    "clip-number": (ppo, None, {"clip": 0.2}, "clip"),
    "clip-nan": (ppo, None, {"clip": (0.2, NAN)}, "clip"),
    "dual-clip": (ppo, None, {"dual_clip": 0.5}, "dual_clip"),
    "clip-rule": (ppo, None, {"clip_rule": "gspo"}, "clip_rule"),
    "ratio": (ppo, None, {"ratio": "tokens"}, "ratio"),
    "ratio-without-sequences": (ppo, None, {"ratio": "sequence"}, "cu_seqlens"),
    "reduction": (ppo, None, {"reduction": "mean"}, "reduction"),
    "reduction-without-sequences": (sft, None, {"reduction": "sequence_mean"}, "cu_seqlens"),
    "kl-name": (ppo, None, {"kl": "k4", "kl_coef": 0.1, "ref_logp": torch.zeros(N)}, "kl"),
    "kl-without-reference": (ppo, None, {"kl_coef": 0.1}, "ref_logp"),
    "kl-exact-without-reference": (ppo, None, {"kl_coef": 0.1, "kl": "exact"}, "ref"),
    "ref-vocabulary": (ppo, None, {"kl": "exact", "kl_coef": 1, "ref": (torch.ones(N, 2), OTHER)}, "ref"),
    "ref-rows": (ppo, None, {"kl_coef": 0.1, "kl": "exact", "ref": (torch.ones(N + 1, 2), torch.ones(V, 2))}, "ref"),
    "token-weight": (ppo, None, {"token_weight": torch.ones(N + 1)}, "token_weight"),
    "num-tokens": (ppo, None, {"num_tokens": -3}, "num_tokens"),
    "num-tokens-shape": (ppo, None, {"num_tokens": torch.ones(2)}, "num_tokens"),
    "cu-decreasing": (dpo, replace(cu_seqlens=torch.tensor([0, 3, 2, 5, 6])), {}, "cu_seqlens"),
    "cu-short": (dpo, replace(cu_seqlens=torch.tensor([0, 2, 3, 4, 5])), {}, "cu_seqlens"),
    "cu-start": (dpo, replace(cu_seqlens=torch.tensor([1, 2, 3, 5, 6])), {}, "cu_seqlens"),
    "cu-float": (dpo, replace(cu_seqlens=torch.tensor([0.0, 2.0, 3.0, 5.0, 6.0])), {}, "cu_seqlens"),
    "cu-matrix": (dpo, replace(cu_seqlens=torch.tensor([[0, 3, 6]])), {}, "cu_seqlens"),
    "cu-empty": (dpo, replace(cu_seqlens=torch.zeros(0, dtype=torch.long)), {}, "cu_seqlens"),
    "pairs-odd": (dpo, replace(cu_seqlens=torch.tensor([0, 2, 3, 6])), {}, "cu_seqlens"),
    "ref-logp-shape": (dpo, replace(ref_logp=torch.zeros(5)), {}, "ref_logp"),
    "dpo-loss": (dpo, None, {"loss": "ipo"}, "loss"),
    "beta": (dpo, None, {"beta": -0.1}, "beta"),
    "smoothing": (dpo, None, {"label_smoothing": 1.5}, "label_smoothing"),
    "margin-shape": (dpo, None, {"margin": torch.zeros(5)}, "margin"),
    "num-pairs": (dpo, None, {"num_pairs": -1}, "num_pairs"),
    "sft-smoothing": (sft, None, {"label_smoothing": -0.1}, "label_smoothing"),
    "fused-unit": (fused, replace(), {"unit": 2, "cu_seqlens": torch.tensor([0, 2, 3, 6])}, "cu_seqlens|unit"),
    "fused-per-token": (fused, None, {"per_token": (torch.ones(N + 1),)}, "per_token"),
    "fused-per-sequence": (
        fused, None, {"per_sequence": (torch.ones(5),), "cu_seqlens": torch.tensor([0, 2, 3, 5, 6])}, "per_sequence",
    ),
    "fused-cu": (fused, None, {"cu_seqlens": torch.tensor([0, 2, 3, 5, 7])}, "cu_seqlens"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_one_error_that_names_the_argument(case):
    call, change, kwargs, name = BAD[case]
    x = good()
    if change is not None:
        change(x)
    buffer = kwargs.get("weight_grad")
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        call(x, **kwargs)
    message = str(caught.value)
    assert 15 < len(message) < 400, message
    assert buffer is None or not buffer.any()


def test_what_is_good_passes():
    """Otherwise the test above would prove nothing."""
    for call in (token_stats, sft, ppo, dpo, fused):
        call(good())


def test_the_message_says_what_it_got_and_what_it_wants():
    x = good()
    x["targets"][3] = 4321
    with pytest.raises(ValueError, match=rf"4321.*{V - 1}"):
        token_stats(x)


@pytest.mark.parametrize("call", [token_stats, sft, ppo, dpo], ids=lambda f: f.__name__)
@pytest.mark.parametrize("row", [0, 1, 3, 5])
def test_nan_is_found_in_any_row_and_with_any_budget(backend, call, row):
    for max_bytes in (None, 1, 2 * V * 8):
        x = good()
        x["hidden"][row, 2] = NAN
        x["weight"].requires_grad_()
        with pytest.raises(ValueError, match="hidden"):
            call(x, max_bytes=max_bytes, backend=backend)


def test_checks_can_be_switched_off():
    """The data is then believed: what is not finite goes in, and comes out."""
    x = good()
    x["hidden"][0, 1] = NAN
    assert token_stats(x, checks=False).logp[0].isnan()
    assert token_stats(x, checks=False).logp[1].isfinite()


def test_shapes_are_checked_even_then():
    x = good()
    x["hidden"] = torch.randn(N, H + 1)
    with pytest.raises(ValueError, match=r"hidden|weight"):
        token_stats(x, checks=False)


def kto(x, desirable, kl=0.0, **kwargs):
    return rk.kto_loss(x["hidden"], x["weight"], x["targets"], x["cu_seqlens"], x["ref_logp"], desirable, kl, **kwargs)


@pytest.mark.parametrize(("desirable", "kl", "name"), [
    (torch.ones(3, dtype=torch.bool), 0.0, "desirable"),
    (torch.ones(4), 0.0, "desirable"),
    (torch.ones(4, dtype=torch.bool), torch.zeros(2), "kl"),
    (torch.ones(4, dtype=torch.bool), NAN, "kl"),
])  # fmt: skip
def test_kto(desirable, kl, name):
    with pytest.raises((ValueError, TypeError), match=name):
        kto(good(), desirable, kl)


ONES = torch.ones(6)
CU = torch.tensor([0, 3, 6])
HEADLESS: dict[str, tuple[Callable[[], Any], str]] = {
    "bt-odd": (lambda: rk.bradley_terry_loss(torch.ones(3)), "scores"),
    "bt-groups": (lambda: rk.bradley_terry_loss(ONES, ranks=torch.arange(6), groups=4), "groups"),
    "bt-ranks": (lambda: rk.bradley_terry_loss(ONES, ranks=torch.arange(5)), "ranks"),
    "bt-margin": (lambda: rk.bradley_terry_loss(ONES, margin=torch.ones(4)), "margin"),
    "bt-smoothing": (lambda: rk.bradley_terry_loss(ONES, label_smoothing=2.0), "label_smoothing"),
    "pl-ranks": (lambda: rk.plackett_luce_loss(ONES, torch.arange(4), 3), "ranks"),
    "pl-groups": (lambda: rk.plackett_luce_loss(ONES, torch.arange(6), torch.zeros(5, dtype=torch.long)), "groups"),
    "pl-top": (lambda: rk.plackett_luce_loss(ONES, torch.arange(6), 3, top=0), "top"),
    "nce-temperature": (
        lambda: rk.infonce_loss(ONES, torch.tensor([True, False, False] * 2), 3, temperature=0.0),
        "temperature",
    ),
    "nce-positive": (lambda: rk.infonce_loss(ONES, torch.tensor([0, 1]), 3), "positive"),
    "nce-shape": (lambda: rk.infonce_loss(ONES, torch.ones(5, dtype=torch.bool), 3), "positive"),
    "value-shape": (lambda: rk.value_loss(ONES, torch.ones(5)), "returns"),
    "value-clip": (lambda: rk.value_loss(ONES, ONES, old_values=ONES, clip=-0.2), "clip"),
    "value-old": (lambda: rk.value_loss(ONES, ONES, clip=0.2), "old_values"),
    "value-mask": (lambda: rk.value_loss(ONES, ONES, mask=torch.ones(5, dtype=torch.bool)), "mask"),
    "gae-shape": (lambda: rk.gae(ONES, torch.ones(5), CU), "values"),
    "gae-cu": (lambda: rk.gae(ONES, ONES, torch.tensor([0, 4, 3, 6])), "cu_seqlens"),
    "gae-cu-end": (lambda: rk.gae(ONES, ONES, torch.tensor([0, 4])), "cu_seqlens"),
    "gae-gamma": (lambda: rk.gae(ONES, ONES, CU, gamma=1.5), "gamma"),
    "gae-lam": (lambda: rk.gae(ONES, ONES, CU, lam=-0.1), "lam"),
    "gae-bootstrap": (lambda: rk.gae(ONES, ONES, CU, bootstrap=torch.ones(3)), "bootstrap"),
    "gae-mask": (lambda: rk.gae(ONES, ONES, CU, mask=torch.ones(5, dtype=torch.bool)), "mask"),
    "gae-masked-reward": (lambda: rk.gae(ONES, ONES, CU, mask=torch.arange(6) > 0), "rewards"),
    "shaped-scores": (lambda: rk.shaped_rewards(torch.ones(3), ONES, ONES, CU, beta=0.1), "scores"),
    "shaped-kl": (lambda: rk.shaped_rewards(torch.ones(2), ONES, ONES, CU, beta=0.1, kl="k4"), "kl"),
    "group-size": (lambda: rk.group_advantages(ONES, 4), "groups"),
    "group-baseline": (lambda: rk.group_advantages(ONES, 2, baseline="median"), "baseline"),
    "group-scale": (lambda: rk.group_advantages(ONES, 2, scale="std"), "scale"),
    "whiten-mask": (lambda: rk.whiten(ONES, torch.ones(5, dtype=torch.bool)), "mask"),
}


@pytest.mark.parametrize(("name", "wrong"), [
    ("hidden_size", 0), ("hidden_size", None), ("hidden_size", 2.0), ("vocab_size", -3), ("vocab_size", NAN),
    ("dtype", None), ("dtype", "float32"), ("dtype", torch.int64),
    ("device", None), ("device", "x"), ("device", "meta"), ("device", "cuda:99"), ("backend", "tritton"),
])  # fmt: skip
def test_warmup(name, wrong):
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        rk.warmup(**{"hidden_size": 8, "vocab_size": 16, "dtype": torch.float32, name: wrong})


@pytest.mark.parametrize("case", list(HEADLESS))
def test_without_a_head(case):
    call, name = HEADLESS[case]
    with pytest.raises((ValueError, TypeError), match=name):
        call()
