"""What a loss logs beside itself, once more: the reference has losses only. Arguments are the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import reference
from rlhf_kernels.reference.losses import kept_per_sequence, spread
from rlhf_kernels.reference.preferences import sequence_sums
from rlhf_kernels.reference.rewards import members

Args = dict[str, Any]
Logged = dict[str, Tensor]


def mean(x: Tensor, where: Tensor | None = None) -> Tensor:
    """Of what is selected; zero where that is nothing."""
    x = x.double() if x.dtype == torch.bool else x
    x = x.flatten() if where is None else x[where]
    return x.mean() if x.numel() else x.new_zeros(())


def kept_of(x: Args) -> Tensor:
    return x["targets"].flatten() != x.get("ignore_index", -100)


def head_only(x: Args) -> Args:
    names = ("bias", "temperature", "softcap", "logit_scale", "vocab_size", "ignore_index", "dtype")
    return {name: x[name] for name in names if name in x}


def policy(x: Args, exact_kl: Tensor | None) -> Logged:
    kept = kept_of(x)
    stats = reference.token_stats(x["hidden"], x["weight"], x["targets"], **head_only(x))
    logp, entropy = stats.logp.flatten()[kept], stats.entropy.flatten()[kept]
    column = {k: x[k].flatten()[kept].to(logp.dtype) for k in ("old_logp", "ref_logp") if x.get(k) is not None}
    log_ratio = logp - column.get("old_logp", logp)
    advantages = spread(x["advantages"], x["targets"], x.get("cu_seqlens"))[kept]
    r = log_ratio.exp()
    if x.get("ratio") == "sequence":
        place = kept.long().cumsum(0) - 1
        for rows in kept_per_sequence(x["targets"].flatten(), x["cu_seqlens"], x.get("ignore_index", -100)):
            r[place[rows]] = log_ratio[place[rows]].mean().exp()
    clip, dual = x.get("clip", (0.2, 0.2)), x.get("dual_clip")
    below, above = r < 1 - clip[0], r > 1 + clip[1]
    if x.get("clip_rule", "ppo") == "ppo":
        below, above = below & (advantages < 0), above & (advantages > 0)
    capped = torch.zeros_like(below) if dual is None else (r > dual) & (advantages < 0)
    found = {
        "clipfrac": mean(below | above | capped), "clipfrac_low": mean(below), "clipfrac_high": mean(above),
        "approx_kl": mean(torch.expm1(log_ratio) - log_ratio), "ratio": mean(r), "entropy": mean(entropy),
    }  # fmt: skip
    if dual is not None:
        found["clipfrac_dual"] = mean(capped)
    if exact_kl is not None:
        found["kl"] = mean(exact_kl.flatten()[kept])
    elif "ref_logp" in column:
        lr, kind = column["ref_logp"] - logp, x.get("kl", "k3")
        found["kl"] = mean({"k1": -lr, "k2": lr**2 / 2, "k3": torch.expm1(lr) - lr}[kind[:2]])
    return found


def sft_loss(x: Args) -> Logged:
    kept = kept_of(x)
    stats = reference.token_stats(x["hidden"], x["weight"], x["targets"], **head_only(x))
    return {
        "nll": mean(-stats.logp.flatten(), kept),
        "entropy": mean(stats.entropy.flatten(), kept),
        "accuracy": mean(stats.top1.flatten(), kept),
    }


def _sums(x: Args) -> tuple[Tensor, Tensor, Tensor]:
    head = {k: v for k, v in head_only(x).items() if k != "ignore_index"}
    ref = x.get("ref_logp")
    if x["cu_seqlens"].numel() == 1:
        return (x["hidden"].new_zeros(0, dtype=torch.float64),) * 3
    return sequence_sums(
        x["hidden"], x["weight"], x["targets"], x["cu_seqlens"], ref, x.get("ignore_index", -100), head
    )


def pairs(kind: str) -> Callable[[Args], Logged]:
    def of(x: Args) -> Logged:
        policy, ref, lengths = _sums(x)
        count = lengths.clamp(min=1)
        beta = x.get("beta", 2.0 if kind == "simpo_loss" else 0.1)
        per_token = {"dpo_loss": False, "ipo_loss": True}.get(kind, True)
        rewards = (policy - ref) / (count if x.get("length_normalize", per_token) else 1)
        rewards = rewards - torch.log1p(-rewards.exp()) if kind == "orpo_loss" else beta * rewards
        both = (lengths[0::2] > 0) & (lengths[1::2] > 0)
        chosen, rejected = rewards[0::2], rewards[1::2]
        found = {
            "rewards/chosen": mean(chosen, both), "rewards/rejected": mean(rejected, both),
            "margin": mean(chosen - rejected, both), "accuracy": mean(chosen > rejected, both),
            "logp/chosen": mean(policy[0::2], both), "logp/rejected": mean(policy[1::2], both),
        }  # fmt: skip
        if kind == "orpo_loss" or x.get("sft_coef"):
            found["nll"] = -policy[0::2].sum() / lengths[0::2].sum().clamp(min=1)
        return found

    return of


def kto_loss(x: Args) -> Logged:
    policy, ref, lengths = _sums(x)
    living, good = lengths > 0, x["desirable"]
    rewards = x.get("beta", 0.1) * (policy - ref)
    baseline = torch.as_tensor(x["kl"], dtype=policy.dtype).clamp(min=0)
    return {
        "rewards/chosen": mean(rewards, living & good),
        "rewards/rejected": mean(rewards, living & ~good),
        "kl": mean(baseline.expand(rewards.shape), living),
    }


def value_loss(x: Args) -> Logged:
    values = x["values"].double()
    kept = x.get("mask", torch.ones(values.shape, dtype=torch.bool))
    v, r = values[kept], x["returns"].double()[kept]
    found = {"values": mean(v), "returns": mean(r), "explained_var": v.new_zeros(())}
    if x.get("clip") is not None:
        old = x["old_values"].double()[kept]
        bound = (old + (v - old).clamp(-x["clip"], x["clip"]) - r) ** 2
        found["clipfrac"] = mean(((v - old).abs() > x["clip"]) & (bound > (v - r) ** 2))
    if len(r):
        scale = r.var(correction=0)
        if scale > 0:
            found["explained_var"] = 1 - (r - v).var(correction=0) / scale
    return found


def bradley_terry_loss(x: Args) -> Logged:
    scores, ranks, each = x["scores"].double(), x.get("ranks"), []
    for group in members(x.get("groups", 2), scores):
        ordered = [(i, j) for i in group for j in group if (ranks[i] < ranks[j] if ranks is not None else i < j)]
        if ordered:
            better, worse = (scores[list(side)] for side in zip(*ordered, strict=True))
            parts = ((better > worse).double(), better - worse, better, worse)
            each.append(torch.stack([part.mean() for part in parts]))
    found = torch.stack(each).mean(0) if each else torch.zeros(4, dtype=torch.float64)
    return dict(zip(("accuracy", "margin", "rewards/chosen", "rewards/rejected"), found, strict=True))


def top_hit(x: Args, good: Callable[[list[int]], list[int]]) -> Logged:
    """How often one of the good has the group's highest score; groups without any count nowhere."""
    scores = x["scores"].double()
    hits = []
    for group in members(x["groups"], scores):
        chosen = good(group)
        if len(chosen) > 0:
            best = max(float(scores[i]) for i in group)
            hits.append(float(any(float(scores[i]) == best for i in chosen)))
    return {"accuracy": torch.tensor(sum(hits) / max(1, len(hits)), dtype=torch.float64)}


def plackett_luce_loss(x: Args) -> Logged:
    ranks = x["ranks"]
    return top_hit(x, lambda m: [i for i in m if all(ranks[i] <= ranks[j] for j in m)] if len(m) > 1 else [])


def infonce_loss(x: Args) -> Logged:
    def good(m: list[int]) -> list[int]:
        right = [i for i in m if x["positive"][i]]
        return right if len(right) < len(m) else []

    return top_hit(x, good)


METRICS: dict[str, Callable[[Args], Logged]] = {
    f.__name__: f for f in (sft_loss, kto_loss, value_loss, bradley_terry_loss, plackett_luce_loss, infonce_loss)
} | {kind: pairs(kind) for kind in ("dpo_loss", "ipo_loss", "orpo_loss", "simpo_loss")}
