"""The tables of docs/coming_from.md against the packages themselves, where a loss of theirs can be called alone."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from half import half
from torch import Tensor

from tests.support.mapping import B, K, T, by_pairs, logps, ours, rows, world

ROWS = rows()
DPO_BETA = 0.1
spec = find_spec("verl")


def near(got: Tensor, wanted: Tensor) -> None:
    """Liger computes log-probabilities in float32, whatever it is given."""
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=2e-5, atol=1e-6)


def compared(key: tuple[str, str], names: dict[str, Any], theirs: Tensor, **mine: Any) -> None:
    """Value and gradient of the hidden states."""
    (wanted,) = torch.autograd.grad(theirs, names["hidden"], retain_graph=True)
    out = ours(ROWS[key][0], names | mine)
    loss = out if isinstance(out, Tensor) else out.loss
    (got,) = torch.autograd.grad(loss, names["hidden"])
    assert wanted.norm() > 1e-3
    near(got, wanted)
    if not ROWS[key][1].startswith("same gradient"):
        near(loss, theirs)


# TRL: its own method, with nothing but what it reads of its trainer.

GRPO = {
    "grpo": {}, "bnpo": {}, "dapo (default)": {"loss_type": "dapo"}, "dr_grpo": {}, "sapo": {},
    "cispo": {"epsilon_high": 1.2}, "luspo": {"importance_sampling_level": "sequence"},
    'grpo, importance_sampling_level="sequence" (GSPO)': {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo, delta": {"loss_type": "dapo", "delta": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("name", GRPO)
def test_trl_grpo(name: str) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    n = world()
    args = SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1)
    trainer = SimpleNamespace(
        args=args, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0,
        importance_sampling_level="token", loss_type=name, epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
        max_completion_length=n["max_completion_length"], current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps(n), torch.zeros(B, T), None),
    )  # fmt: skip
    for option, value in GRPO[name].items():
        setattr(args if option == "delta" else trainer, option, value)
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long), "prompt_mask": torch.ones(B, 1),
        "completion_ids": n["targets"].clamp(min=0), "completion_mask": n["mask"], "advantages": n["advantages"],
        "old_per_token_logps": n["old_logp"], "num_items_in_batch": torch.tensor(n["num_items"]),
    }  # fmt: skip
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    n["set_tokens"](float(n["mask"].sum()))
    more = {"advantages": n["advantages"][:, None].expand(B, T)} if name == "sapo" else {}
    if name == "sapo":  # TRL takes the mean within sequences first; the page's objective is a mean over tokens
        weight = n["mask"].sum() / (B * n["mask"].sum(1, keepdim=True))
        more["advantages"] = more["advantages"] * weight
    compared(("TRL", name), n, theirs, **more)


@pytest.mark.parametrize("name", ["sigmoid (default)", "hinge", "ipo", "sigmoid_norm", "apo_zero"])
def test_trl_dpo(name: str) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    n = world()
    nothing = torch.zeros(B, T)
    scored = SimpleNamespace(log_probs=logps(n), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    gathered = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        loss_types=[name.partition(" ")[0]], loss_weights=[1.0], beta=DPO_BETA, ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", precompute_ref_logps=True, aux_loss_enabled=False, accelerator=gathered,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    mask = torch.nn.functional.pad(n["mask"], (1, 0)).long()  # of tokens; a row of ours is that of the token before
    chosen, rejected = (n["ref_logp"] * n["mask"]).sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long), "completion_mask": mask, "attention_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **_: scored, inputs, False)
    compared(("TRL", name), n, theirs, **by_pairs(n))


# Liger: chosen and rejected halves.

LIGER = {
    "LigerFusedLinearDPOLoss(beta)": {"use_ref_model": True},
    "LigerFusedLinearDPOLoss(beta, average_log_prob=True)": {"use_ref_model": True, "average_log_prob": True},
    'LigerFusedLinearDPOLoss(beta, loss_type="hinge")': {"use_ref_model": True, "loss_type": "hinge"},
    "LigerFusedLinearCPOLoss(beta, label_smoothing=0.1, compute_nll_loss=False)": {
        "label_smoothing": 0.1, "compute_nll_loss": False,
    },
    "LigerFusedLinearORPOLoss(beta)": {},
    "LigerFusedLinearSimPOLoss(beta, gamma=gamma, compute_nll_loss=False)": {"gamma": 0.5, "compute_nll_loss": False},
}  # fmt: skip


def liger(name: str, **options: Any) -> Any:
    found = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    return getattr(found, name.partition("(")[0])(compiled=False, **options)


@pytest.mark.parametrize("name", LIGER)
def test_liger_pairs(name: str) -> None:
    n = world()
    loss = liger(name, beta=DPO_BETA, **LIGER[name])
    reference = {"ref_input": n["ref_hidden"], "ref_weight": n["ref_weight"]} if "use_ref_model" in LIGER[name] else {}
    theirs = loss(n["weight"], n["hidden"], n["targets"], **reference)[0]
    mine = by_pairs(n)
    if "CPO" in name:
        mine["ref_logp"] = torch.zeros_like(mine["ref_logp"])
    compared(("Liger", name), n, theirs, **mine)


def test_liger_kto() -> None:
    n = world()
    loss = liger("LigerFusedLinearKTOLoss", beta=DPO_BETA, use_ref_model=True)
    theirs = loss(
        n["hidden"], n["weight"], n["targets"], None, n["desirable"], ref_input=n["ref_hidden"],
        ref_weight=n["ref_weight"], kl=torch.tensor(n["kl"]),
    )[0]  # fmt: skip
    compared(("Liger", "LigerFusedLinearKTOLoss(beta)"), n, theirs)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "cispo", "grpo, beta"])
def test_liger_grpo(kind: str) -> None:
    n = world()
    name, _, beta = kind.partition(", ")
    loss = liger(
        "LigerFusedLinearGRPOLoss", beta=DPO_BETA if beta else 0.0, epsilon_low=0.2, loss_type=name,
        epsilon_high=1.2 if name == "cispo" else 0.28, max_completion_length=n["max_completion_length"],
        use_ref_model=bool(beta),
    )  # fmt: skip
    theirs = loss(
        n["hidden"], n["weight"], n["targets"].clamp(min=0), n["mask"].double(), n["advantages"],
        old_per_token_logps=n["old_logp"], ref_per_token_logps=n["ref_logp"] if beta else None,
    )[0]  # fmt: skip
    row = f'LigerFusedLinearGRPOLoss(loss_type="{name}"{", beta" if beta else ""})'
    compared(("Liger", row), n, theirs)


@pytest.mark.parametrize("beta", [0, 1])
def test_liger_jsd(beta: int) -> None:
    n = world()
    loss = liger("LigerFusedLinearJSDLoss", weight_hard_loss=0.0, weight_soft_loss=1.0, beta=float(beta))
    flat = n["hidden"].view(B * T, -1), n["weight"], n["ref_hidden"].view(B * T, -1), n["ref_weight"]
    theirs = loss(*flat, n["targets"].view(-1))
    compared(("Liger", f"LigerFusedLinearJSDLoss(beta={beta}), soft loss only"), n, theirs)


# verl: its functions of tensors.


@pytest.fixture(scope="module")
def algos() -> Any:
    if spec is None:
        pytest.skip("verl is not installed")
    utils = str(Path(next(iter(spec.submodule_search_locations or ())), "utils"))
    stubs = {
        "omegaconf": {"DictConfig": dict}, "tensordict": {"TensorDict": dict},
        "verl.utils": {"__path__": [utils], "as_torch_index": None, "group_mean_std": None},
        "verl.workers.config": {"ActorConfig": object},
    }  # fmt: skip
    bare = ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo", "verl.workers", "verl.plugin")
    return half("verl.trainer.ppo.core_algos", bare, stubs)


class Config(SimpleNamespace):
    """What verl's losses read of an actor's config."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


POLICY = [name for (section, name), (call, _) in ROWS.items() if section == "verl" and call.startswith("ppo_loss")]


@pytest.mark.parametrize("name", POLICY)
def test_verl_policy_losses(name: str, algos: Any) -> None:
    n = world()
    kind, _, mode = name.partition(", ")
    config = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={})
    mode = mode or {"gspo": "seq-mean-token-mean"}.get(kind, "token-mean")
    a = n["advantages"][:, None].expand(B, T)
    theirs, _ = algos.get_policy_loss_fn(kind)(n["old_logp"], logps(n), a, n["mask"].double(), mode, config)
    compared(("verl", name), n, theirs)


def test_verl_advantages(algos: Any) -> None:
    n = world()
    mask, rewards, index = n["mask"].double(), n["rewards"], np.repeat(np.arange(B // K), K)

    def scores_of(found: Tensor) -> Tensor:
        return torch.stack([row[on][0] for row, on in zip(found, n["mask"], strict=True)])

    def mine(name: str, **given: Any) -> Any:
        return ours(ROWS["verl", name][0], n, **given)

    more = {"scores": rewards.sum(-1), "groups": K}
    near(mine("rloo", **more), scores_of(algos.compute_rloo_outcome_advantage(rewards, mask, index)[0]))
    grpo = algos.compute_grpo_outcome_advantage
    centred = scores_of(grpo(rewards, mask, index, norm_adv_by_std_in_grpo=False)[0])
    near(mine("grpo, norm_adv_by_std_in_grpo=False", **more), centred)
    divided = scores_of(grpo(rewards, mask, index)[0])
    torch.testing.assert_close(mine("grpo", **more), divided * (K / (K - 1)) ** 0.5, rtol=1e-4, atol=0)

    flat = {name: n[name].reshape(-1) for name in ("rewards", "values", "mask")}
    count = float(mask.sum())
    unbiased = (count / (count - 1)) ** 0.5
    found = algos.compute_gae_advantage_return(rewards, n["values"], mask, n["gamma"], n["lam"])
    got, returns = mine("gae", **flat)
    torch.testing.assert_close(got[flat["mask"]], found[0][n["mask"]] * unbiased, rtol=1e-5, atol=1e-6)
    near(returns[flat["mask"]], found[1][n["mask"]])
    plain, _ = ours(ROWS["verl", "gae"][0].replace("whiten=True", "whiten=False"), n, **flat)
    near(plain[flat["mask"]], (found[1] - n["values"])[n["mask"]])
    zeros = torch.zeros(B * T, dtype=torch.float64)
    found = algos.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, Config(gamma=n["gamma"]))
    got, _ = mine("reinforce_plus_plus", **flat, zeros=zeros)
    torch.testing.assert_close(got[flat["mask"]], found[0][n["mask"]] * unbiased, rtol=1e-5, atol=1e-6)

    theirs, _ = algos.compute_value_loss(n["values"], n["returns"], n["old_values"], mask, 0.2)
    near(mine("compute_value_loss").loss, theirs)
