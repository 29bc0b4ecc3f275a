"""Random calls of the front door, ``make test-fuzz`` in small; and whether they find what is broken on purpose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_kernels import advantages, checks, estimators
from rlhf_kernels.engine import op
from rlhf_kernels.losses import surrogate
from tests.fuzz.run import trial

CALLS, PARTS = 300, 6  # parts, so that several processes share them


@pytest.mark.parametrize("part", range(PARTS))
def test_a_right_answer_or_one_error_that_names_the_argument(part):
    faults, verdicts = [], set()
    for seed in range(part, CALLS, PARTS):
        verdict, text = trial(seed)
        verdicts.add(verdict)
        faults += [text] * (verdict == "fault")
    assert not faults, "\n\n".join(["", *faults])
    assert verdicts == {"right", "refused"}


@pytest.fixture
def everywhere(monkeypatch) -> Callable[[Any, Any], None]:
    """Puts something else in the place of a function, whoever has imported it."""

    def replace(old: Any, new: Any) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("rlhf_kernels"):
                for key, x in list(vars(module).items()):
                    if x is old:
                        monkeypatch.setattr(module, key, new)

    return replace


def found(function: str, most: int, about: str | None = None) -> str:
    """What a fault among so many calls says, or nothing."""
    texts = (trial(seed, function, about)[1] for seed in range(most))
    return next(filter(None, texts), "")


def wants_lets_pass(name: str) -> tuple[Any, Any]:
    def wants(condition: bool, argument: str, got: object, want: str) -> None:
        old(condition or argument == name, argument, got, want)

    old = checks.wants
    return old, wants


def finite_lets_pass(name: str) -> tuple[Any, Any]:
    def finite(where: Tensor | None = None, **given: Tensor | None) -> None:
        old(where, **{k: x for k, x in given.items() if k != name})

    old = checks.finite
    return old, finite


def hold_lets_pass(name: str) -> tuple[Any, Any]:
    def hold(facts: list[tuple[Tensor, str]]) -> None:
        old([fact for fact in facts if not fact[1].startswith(f"{name}:")])

    old = checks.hold
    return old, hold


def tensor_lets_pass(name: str) -> tuple[Any, Any]:
    def tensor(argument: str, x: object, kind: str = "a tensor") -> None:
        if argument != name:
            old(argument, x, kind)

    old = checks.tensor
    return old, tensor


CHECKS = [
    (wants_lets_pass, "beta", "dpo_loss"),
    (wants_lets_pass, "clip", "ppo_loss"),
    (wants_lets_pass, "softcap", "token_stats"),
    (wants_lets_pass, "label_smoothing", "sft_loss"),
    (wants_lets_pass, "num_tokens", "orpo_loss"),
    (wants_lets_pass, "groups", "group_advantages"),
    (wants_lets_pass, "gamma", "gae"),
    (wants_lets_pass, "kl", "shaped_rewards"),
    (wants_lets_pass, "top", "plackett_luce_loss"),
    (wants_lets_pass, "vocab_size", "kl_divergence"),
    (finite_lets_pass, "advantages", "grpo_loss"),
    (finite_lets_pass, "ref_logp", "kto_loss"),
    (finite_lets_pass, "scores", "infonce_loss"),
    (finite_lets_pass, "values", "value_loss"),
    (finite_lets_pass, "x", "whiten"),
    (hold_lets_pass, "cu_seqlens", "shaped_rewards"),
    (tensor_lets_pass, "mask", "whiten"),
]


@pytest.mark.parametrize(("breaks", "name", "function"), CHECKS, ids=[f"{f}-{n}" for _, n, f in CHECKS])
def test_a_check_that_is_gone_is_missed(everywhere, breaks, name, function):
    assert not found(function, 60, name), "found before anything was broken"
    everywhere(*breaks(name))
    text = found(function, 60, name)
    assert f"changed: {name}:" in text, text or "nobody noticed"


def steeper(grad: Tensor | None, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    right = PADDED(grad, like, dtype)
    return None if right is None else right * 1.01


def clipped_the_other_way(ratio: Tensor, advantages: Tensor, clip: Any, dual_clip: float | None) -> Any:
    return SURROGATE(ratio, advantages, (clip[1], clip[0] + 0.1), dual_clip)


def whitened_by_n_less_one(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return WHITEN(x, *args, **kwargs) * (1 - 1 / max(2, x.numel())) ** 0.5


def into_the_input(logp: Tensor, ref_logp: Tensor, kl: str) -> Tensor:
    return ESTIMATE(logp.add_(1).sub_(1), ref_logp, kl)


PADDED, SURROGATE, WHITEN, ESTIMATE = op.padded, surrogate.clipped_surrogate, advantages._whiten, estimators.kl_estimate
MATHEMATICS = [
    (PADDED, steeper, "sft_loss", "gradient of weight: off by"),
    (PADDED, steeper, "token_stats", "off by"),
    (SURROGATE, clipped_the_other_way, "ppo_loss", "off by"),
    (WHITEN, whitened_by_n_less_one, "whiten", "off by"),
    (ESTIMATE, into_the_input, "shaped_rewards", "was changed by the call"),
]


@pytest.mark.parametrize(
    ("old", "new", "function", "said"), MATHEMATICS, ids=[new.__name__ for _, new, *_ in MATHEMATICS]
)
def test_wrong_mathematics_is_found(everywhere, old, new, function, said):
    everywhere(old, new)
    assert said in found(function, 100)
