"""docs/coming_from.md: what its tables call equal to losses of TRL, Liger and verl is, by formulas in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.mapping import SAME_GRADIENT, B, K, T, by_pairs, logps, ours, rows, world

Names = dict[str, Any]
ROWS = rows()
FLAVOUR: dict[tuple[str, str], Callable[[Names], Tensor]] = {}


def theirs(section: str, *names: str) -> Callable:
    def keep(function: Callable[[Names], Tensor]) -> Callable[[Names], Tensor]:
        FLAVOUR.update({(section, name): function for name in names})
        return function

    return keep


# Policies: [B, T] losses, then how they are averaged.


def clipped(n: Names, *, sequence: bool = False, dual: float | None = None) -> Tensor:
    log_ratio, a = logps(n) - n["old_logp"], n["advantages"][:, None]
    if sequence:
        log_ratio = ((log_ratio * n["mask"]).sum(1) / n["mask"].sum(1))[:, None].expand(B, T)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - n["lo"], 1 + n["hi"])
    loss = torch.maximum(-ratio * a, -bounded * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(-dual * a, loss), loss)


def cispo(n: Names, low: float, high: float) -> Tensor:
    weight = (logps(n) - n["old_logp"]).exp().clamp(low, high).detach()
    return -weight * n["advantages"][:, None] * logps(n)


def token_mean(n: Names, x: Tensor, over: float | None = None) -> Tensor:
    return (x * n["mask"]).sum() / (n["mask"].sum() if over is None else over)


def sequence_sum(n: Names, x: Tensor) -> Tensor:
    return (x * n["mask"]).sum(1).mean()


def sequence_mean(n: Names, x: Tensor) -> Tensor:
    return ((x * n["mask"]).sum(1) / n["mask"].sum(1)).mean()


def k3(n: Names) -> Tensor:
    d = n["ref_logp"] - logps(n)
    return d.exp() - d - 1


LIGER_GRPO = 'LigerFusedLinearGRPOLoss(loss_type="{}")'
FLAVOUR |= {
    ("TRL", "grpo"): lambda n: sequence_mean(n, clipped(n)),
    ("TRL", "bnpo"): lambda n: token_mean(n, clipped(n)),
    ("TRL", "dapo (default)"): lambda n: token_mean(n, clipped(n), n["num_items"]),
    ("TRL", "dr_grpo"): lambda n: token_mean(n, clipped(n), B * n["max_completion_length"]),
    ("TRL", "cispo"): lambda n: token_mean(n, cispo(n, 0.0, n["eps_max"]), n["num_items"]),
    ("TRL", "luspo"): lambda n: sequence_sum(n, clipped(n, sequence=True)),
    ("TRL", 'grpo, importance_sampling_level="sequence" (GSPO)'): lambda n: sequence_mean(n, clipped(n, sequence=True)),
    ("TRL", "dapo, delta"): lambda n: token_mean(n, clipped(n, dual=n["delta"]), n["num_items"]),
    ("Liger", LIGER_GRPO.format("grpo")): lambda n: sequence_mean(n, clipped(n)),
    ("Liger", LIGER_GRPO.format("bnpo")): lambda n: token_mean(n, clipped(n)),
    ("Liger", LIGER_GRPO.format("dr_grpo")): lambda n: token_mean(n, clipped(n), B * n["max_completion_length"]),
    ("Liger", LIGER_GRPO.format("cispo")): lambda n: token_mean(n, cispo(n, 0.0, n["eps_max"])),
    ("Liger", LIGER_GRPO.format("grpo").replace(")", ", beta)")): lambda n: sequence_mean(
        n, clipped(n) + n["beta"] * k3(n)
    ),
    ("verl", "vanilla"): lambda n: token_mean(n, clipped(n, dual=3.0)),
    ("verl", "vanilla, seq-mean-token-sum"): lambda n: sequence_sum(n, clipped(n, dual=3.0)),
    ("verl", "vanilla, seq-mean-token-mean"): lambda n: sequence_mean(n, clipped(n, dual=3.0)),
    ("verl", "vanilla, seq-mean-token-sum-norm"): lambda n: sequence_sum(n, clipped(n, dual=3.0)) / n["horizon"],
    ("verl", "gspo"): lambda n: sequence_mean(n, clipped(n, sequence=True)),
    ("verl", "cispo"): lambda n: token_mean(n, cispo(n, 1 - n["lo"], 1 + n["hi"])),
    ("verl", "gpg"): lambda n: token_mean(n, -logps(n) * n["advantages"][:, None]),
}


@theirs("TRL", "sapo")
def _(n: Names) -> Tensor:
    a = n["advantages"][:, None]
    tau = torch.where(a > 0, 1.0, 1.05)
    gate = torch.sigmoid(tau * ((logps(n) - n["old_logp"]).exp() - 1)) * 4 / tau
    return token_mean(n, -gate * a)


@theirs("TRL", "RLOOTrainer, loss")
def _(n: Names) -> Tensor:
    log_ratio = ((logps(n) - n["old_logp"]) * n["mask"]).sum(1)
    ratio, a = log_ratio.exp(), n["advantages"]
    return -torch.minimum(ratio * a, ratio.clamp(1 - n["lo"], 1 + n["hi"]) * a).mean()


# Preferences: halves as the others have them.


def sums(n: Names, *, reference: bool = True, mean: bool = False) -> tuple[Tensor, Tensor]:
    x = (logps(n) - (n["ref_logp"] if reference else 0.0)) * n["mask"]
    total = x.sum(1) / (n["mask"].sum(1) if mean else 1)
    chosen, rejected = total.chunk(2)
    return chosen, rejected


def smoothed(u: Tensor, eps: float = 0.0) -> Tensor:
    return (-(1 - eps) * F.logsigmoid(u) - eps * F.logsigmoid(-u)).mean()


def difference(n: Names, **how: Any) -> Tensor:
    chosen, rejected = sums(n, **how)
    return chosen - rejected


def hinge(n: Names) -> Tensor:
    return F.relu(1 - n["beta"] * difference(n)).mean()


def kto(n: Names, kl: float, good: float = 1.0, bad: float = 1.0) -> Tensor:
    r, beta = ((logps(n) - n["ref_logp"]) * n["mask"]).sum(1), n["beta"]
    each = torch.where(
        n["desirable"], good * (1 - torch.sigmoid(beta * (r - kl))), bad * (1 - torch.sigmoid(beta * (kl - r)))
    )
    return each.mean()


@theirs("Liger", "LigerFusedLinearORPOLoss(beta)")
@theirs("TRL", "ORPOTrainer (experimental)")
def _(n: Names) -> Tensor:
    chosen, rejected = sums(n, reference=False, mean=True)
    odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    half = n["mask"][: B // 2]
    nll = -(logps(n)[: B // 2] * half).sum() / half.sum()
    return nll - n["beta"] * F.logsigmoid(odds).mean()


@theirs("TRL", "apo_zero")
def _(n: Names) -> Tensor:
    chosen, rejected = sums(n)
    return (1 - torch.sigmoid(n["beta"] * chosen) + torch.sigmoid(n["beta"] * rejected)).mean()


LIGER_DPO, LIGER_CPO = "LigerFusedLinearDPOLoss(beta{})", "LigerFusedLinearCPOLoss(beta, label_smoothing=0.1, {})"
FLAVOUR |= {
    ("TRL", "sigmoid (default)"): lambda n: smoothed(n["beta"] * difference(n)),
    ("TRL", "hinge"): hinge,
    ("TRL", "ipo"): lambda n: (difference(n, mean=True) - 1 / (2 * n["beta"])).square().mean(),
    ("TRL", "sigmoid_norm"): lambda n: smoothed(n["beta"] * difference(n, mean=True)),
    ("TRL", "sigmoid, sft with weights (1, w)"): lambda n: (
        smoothed(n["beta"] * difference(n)) - n["w"] * sums(n, reference=False, mean=True)[0].mean()
    ),
    ("TRL", "KTOTrainer, kto"): lambda n: kto(n, n["kl"], 1.5, 0.5),
    ("TRL", "KTOTrainer, apo_zero_unpaired"): lambda n: kto(n, 0.0),
    ("TRL", "CPOTrainer (experimental), sigmoid"): lambda n: smoothed(n["beta"] * difference(n, reference=False), 0.1),
    ("Liger", LIGER_DPO.format("")): lambda n: smoothed(n["beta"] * difference(n)),
    ("Liger", LIGER_DPO.format(", average_log_prob=True")): lambda n: smoothed(n["beta"] * difference(n, mean=True)),
    ("Liger", LIGER_DPO.format(', loss_type="hinge"')): hinge,
    ("Liger", LIGER_CPO.format("compute_nll_loss=False")): lambda n: smoothed(
        n["beta"] * difference(n, reference=False), 0.1
    ),
    ("Liger", "LigerFusedLinearSimPOLoss(beta, gamma=gamma, compute_nll_loss=False)"): lambda n: smoothed(
        n["beta"] * difference(n, reference=False, mean=True) - n["gamma"]
    ),
    ("Liger", "LigerFusedLinearKTOLoss(beta)"): lambda n: kto(n, n["kl"]),
}


# Tokens.


def divergence(n: Names, forward: bool) -> Tensor:
    p = (n["hidden"] @ n["weight"].T).log_softmax(-1)
    q = (n["ref_hidden"] @ n["ref_weight"].T).log_softmax(-1)
    p, q = (q, p) if forward else (p, q)
    return token_mean(n, (p.exp() * (p - q)).sum(-1))


@theirs("Liger", "LigerFusedLinearCrossEntropyLoss(lse_square_scale=z)")
def _(n: Names) -> Tensor:
    lse = (n["hidden"] @ n["weight"].T).logsumexp(-1)
    return token_mean(n, -logps(n) + n["z"] * lse.square())


FLAVOUR |= {
    ("TRL", "SFTTrainer, nll"): lambda n: token_mean(n, -logps(n)),
    ("TRL", "SFTTrainer, dft"): lambda n: token_mean(n, -logps(n).detach().exp() * logps(n)),
    ("Liger", "LigerFusedLinearJSDLoss(beta=1), soft loss only"): lambda n: divergence(n, False),
    ("Liger", "LigerFusedLinearJSDLoss(beta=0), soft loss only"): lambda n: divergence(n, True),
}

PAIRED = {"dpo_loss", "ipo_loss", "orpo_loss", "simpo_loss"}
NO_REFERENCE = ("CPO",)
HEADLESS = ("group_advantages", "gae", "value_loss", "bradley_terry_loss")
WITH_HEAD = [key for key, (call, _) in ROWS.items() if not call.startswith(HEADLESS)]


def test_every_row_is_tried() -> None:
    assert set(FLAVOUR) == set(WITH_HEAD)
    assert len(WITH_HEAD) > 35


@pytest.mark.parametrize("key", WITH_HEAD, ids=lambda key: ": ".join(key))
def test_a_row(key: tuple[str, str]) -> None:
    call, differs = ROWS[key]
    n = world()
    if differs.startswith(SAME_GRADIENT + " at ratio one"):
        n["old_logp"] = logps(n).detach()
    expected = FLAVOUR[key](n)
    (wanted,) = torch.autograd.grad(expected, n["hidden"])
    n["set_tokens"](float(n["mask"].sum()))
    mine = by_pairs(n) if call.partition("(")[0] in PAIRED or "unit=2" in call else n
    if any(word in key[1] for word in NO_REFERENCE):
        mine = mine | {"ref_logp": torch.zeros_like(mine["ref_logp"])}
    if "per_token=(old_logp, advantages)" in call:  # an objective sees one advantage per token
        mine = mine | {"advantages": n["advantages"][:, None].expand(B, T)}
    out = ours(call, mine)
    loss = out if isinstance(out, Tensor) else out.loss
    (got,) = torch.autograd.grad(loss, n["hidden"])
    assert wanted.norm() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    if differs.startswith(SAME_GRADIENT):
        assert not torch.allclose(loss, expected) or "at ratio one" in differs
    else:
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_advantages_and_losses_without_a_head() -> None:
    n, tried = world(), set()

    def mine(section: str, name: str, **given: Any) -> Any:
        tried.add((section, name))
        return ours(ROWS[section, name][0], n, **given)

    groups = n["scores"].view(-1, K)
    centred = groups - groups.mean(1, keepdim=True)
    others = (centred * K / (K - 1)).flatten()
    torch.testing.assert_close(mine("TRL", "RLOOTrainer, advantages", groups=K), others)
    torch.testing.assert_close(mine("verl", "rloo", groups=K), others)
    torch.testing.assert_close(mine("verl", "grpo, norm_adv_by_std_in_grpo=False", groups=K), centred.flatten())
    theirs_of_grpo = (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    larger = mine("verl", "grpo", groups=K) / theirs_of_grpo
    torch.testing.assert_close(larger, torch.full_like(larger, (K / (K - 1)) ** 0.5), rtol=1e-4, atol=0)

    def scanned(values: Tensor, lam: float) -> Tensor:
        found, last, after = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B), torch.zeros(B)
        for t in reversed(range(T)):
            on = n["mask"][:, t]
            delta = n["rewards"][:, t] + n["gamma"] * after - values[:, t]
            last = torch.where(on, delta + n["gamma"] * lam * last, last)
            after = torch.where(on, values[:, t], after)
            found[:, t] = last.where(on, 0.0)
        kept = found[n["mask"]]
        return ((kept - kept.mean()) / kept.var(correction=0).add(1e-8).sqrt()).double()

    flat = {name: n[name].reshape(-1) for name in ("rewards", "values", "mask")}
    got, _ = mine("verl", "gae", **flat)
    torch.testing.assert_close(got[flat["mask"]], scanned(n["values"], n["lam"]), rtol=1e-6, atol=1e-6)
    got, _ = mine("verl", "reinforce_plus_plus", **flat, zeros=torch.zeros(B * T, dtype=torch.float64))
    torch.testing.assert_close(got[flat["mask"]], scanned(torch.zeros(B, T), 1.0), rtol=1e-6, atol=1e-6)

    bounded = n["old_values"] + (n["values"] - n["old_values"]).clamp(-0.2, 0.2)
    square = torch.maximum((n["values"] - n["returns"]) ** 2, (bounded - n["returns"]) ** 2)
    torch.testing.assert_close(mine("verl", "compute_value_loss").loss, 0.5 * token_mean(n, square))

    chosen, rejected = n["scores"].chunk(2)
    wanted = smoothed(chosen - rejected - n["margin"]) + 0.01 * (chosen + rejected).square().mean()
    key = "RewardTrainer, center_rewards_coefficient, margins"
    torch.testing.assert_close(mine("TRL", key, scores=by_pairs(n)["scores"]).loss, wanted)
    assert tried == set(ROWS) - set(WITH_HEAD)
