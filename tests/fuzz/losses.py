"""Valid calls of the losses that meet the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz import heads
from tests.fuzz.draw import Case, Dice, count
from tests.fuzz.heads import boundaries, bounded, buffer, gradients, lengths, per_token, rows, true_logp


def sums(x: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in x.split(sizes)]) if sizes else x.new_zeros(0)


def alive(kept: Tensor, sizes: list[int]) -> Tensor:
    """[S] bool, sequences with a kept token."""
    return sums(kept.long(), sizes) > 0


def reduced(d: Dice, case: Case, kept: Tensor, sizes: list[int] | None, cu_given: bool) -> None:
    """A reduction and its denominators."""
    x = case.plain
    if sizes is not None and d.chance(0.5):
        x["reduction"] = d.pick("sequence_mean", "sequence_sum")
        if not cu_given:
            x["cu_seqlens"] = boundaries(d, sizes)
    elif d.chance(0.3):
        x["reduction"] = "token_mean"
    if d.chance(0.4):
        x["num_tokens"] = count(d, int(kept.sum()))
    if d.chance(0.4):
        x["num_sequences"] = count(d, 1 if sizes is None else int(alive(kept, sizes).sum()))


def references(d: Dice, case: Case, kept: Tensor, cu: Tensor | None) -> None:
    """The KL control of a policy loss: sampled or exact."""
    x = case.plain
    way = d.pick("none", "none", "sampled", "sampled", "exact")
    if way == "sampled":
        x["ref_logp"] = per_token(d, case, "ref_logp", true_logp(case) + 0.5 * d.normal(*x["targets"].shape), kept)
        x["kl"] = d.pick("k2", "k3", "k1+", "k3+", "k1")
        x["kl_coef"] = 0.0 if x["kl"] == "k1" else d.pick(0.0, 0.1, 1)
    elif way == "exact":
        ref = heads.other_head(d, case)
        x["ref"] = d.pick(tuple, list)(ref)
        x["kl"], x["kl_coef"] = "exact", d.pick(0.0, 0.1, 1)
        heads.reference_counts(case, "ref[0]", "ref[1]", ref, kept)
        if x.keys() & {"bias", "softcap", "logit_scale"} or d.chance(0.3):
            x["ref_head"] = {}


def ppo_loss(d: Dice, case: Case) -> None:
    sizes = lengths(d) if d.chance(0.6) else None
    kept = rows(d, case, sizes)
    x, lead = case.plain, case.plain["targets"].shape
    x["old_logp"] = None
    if d.chance(0.7):
        x["old_logp"] = per_token(d, case, "old_logp", true_logp(case) + 0.6 * d.normal(*lead), kept)
    x["advantages"] = per_token(d, case, "advantages", d.normal(*lead), kept)
    cu_given = sizes is not None and d.chance(0.7)
    if cu_given:
        assert sizes is not None
        x["cu_seqlens"] = boundaries(d, sizes)
        if all(sizes) and lead != (len(sizes),) and d.chance(0.6):
            x["advantages"] = d.normal(len(sizes), dtype=d.floats())
            case.counts("advantages", alive(kept, sizes))
        if d.chance(0.4):
            x["ratio"] = "sequence"
    if d.chance(0.5):
        x["clip"] = d.pick((0.2, 0.28), [0.1, 0.3], (0.0, 0.0), (3e-4, 4e-4), (1, 5))
    if d.chance(0.3):
        x["clip_rule"] = d.pick("ppo", "cispo")
    if x.get("clip_rule") != "cispo" and d.chance(0.3):
        x["dual_clip"] = d.pick(None, 1.5, 3)
    if d.chance(0.3):
        x["entropy_coef"] = d.pick(0.01, -0.5, 1)
    if d.chance(0.25):
        x["token_weight"] = per_token(d, case, "token_weight", d.uniform(*lead), kept)
    references(d, case, kept, x.get("cu_seqlens"))
    reduced(d, case, kept, sizes, cu_given)
    if x.get("ratio") != "sequence":
        bounded(d, case, kept)
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


def grpo_loss(d: Dice, case: Case) -> None:
    ppo_loss(d, case)


def sft_loss(d: Dice, case: Case) -> None:
    sizes = lengths(d) if d.chance(0.5) else None
    kept = rows(d, case, sizes)
    x, lead = case.plain, case.plain["targets"].shape
    if d.chance(0.4):
        x["label_smoothing"] = d.pick(0.0, 0.1, 1)
    if d.chance(0.3):
        x["z_loss"] = d.pick(1e-3, 1)
    if d.chance(0.3):
        x["token_weight"] = per_token(d, case, "token_weight", d.normal(*lead), kept)
    reduced(d, case, kept, sizes, cu_given=False)
    bounded(d, case, kept)
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


def preference(d: Dice, case: Case, pairs: bool = True) -> tuple[list[int], Tensor]:
    """Rows and boundaries; sequences and the rows kept."""
    filled = d.chance(0.6)
    sizes = lengths(d, pairs, filled)
    kept = rows(d, case, sizes)
    case.plain["cu_seqlens"] = boundaries(d, sizes)
    return sizes, kept


def referenced(d: Dice, case: Case, sizes: list[int], kept: Tensor) -> None:
    """``ref_logp`` per token, or per sequence where none is empty."""
    x = case.plain
    lead = x["targets"].shape
    ref = true_logp(case) + 0.5 * d.normal(*lead)
    living = alive(kept, sizes)
    if all(sizes) and lead != (len(sizes),) and d.chance(0.4):
        x["ref_logp"] = sums(ref.reshape(-1).where(kept, 0.0), sizes).to(d.floats())
        case.counts("ref_logp", whole(living) if len(sizes) % 2 == 0 and "desirable" not in x else living, ~living)
    else:
        x["ref_logp"] = per_token(d, case, "ref_logp", ref, kept)
        if len(sizes) % 2 == 0:
            counted = whole(living).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
            case.busy["ref_logp"] = (counted & kept).view(lead)


def whole(living: Tensor) -> Tensor:
    """[S] bool, sequences in pairs that live on both sides."""
    return (living[0::2] & living[1::2]).repeat_interleave(2)


def margins(d: Dice, case: Case, sizes: list[int], kept: Tensor) -> None:
    form = d.pick("none", "none", "number", "tensor")
    if form == "number":
        case.plain["margin"] = d.pick(0.5, -1, 0)
    elif form == "tensor":
        case.plain["margin"] = d.normal(len(sizes) // 2, dtype=d.floats())
        counted = whole(alive(kept, sizes))[0::2]
        case.counts("margin", counted, torch.zeros_like(counted))


def paired(d: Dice, case: Case, sizes: list[int], kept: Tensor) -> None:
    """What all losses over pairs end with."""
    if d.chance(0.4):
        case.plain["num_pairs"] = count(d, int(whole(alive(kept, sizes))[0::2].sum()))
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


def dpo_loss(d: Dice, case: Case) -> None:
    sizes, kept = preference(d, case)
    referenced(d, case, sizes, kept)
    x = case.plain
    if d.chance(0.5):
        x["beta"] = d.pick(0.1, 0.5, 2)
    if d.chance(0.4):
        x["loss"] = d.pick("sigmoid", "hinge")
    if d.chance(0.3):
        x["label_smoothing"] = d.pick(0.1, 0.5, 0)
    if d.chance(0.3):
        x["length_normalize"] = d.pick(True, False)
    margins(d, case, sizes, kept)
    if d.chance(0.3):
        x["sft_coef"] = d.pick(0.5, 1)
    paired(d, case, sizes, kept)


def ipo_loss(d: Dice, case: Case) -> None:
    sizes, kept = preference(d, case)
    referenced(d, case, sizes, kept)
    if d.chance(0.5):
        case.plain["beta"] = d.pick(0.1, 0.5, 2)
    if d.chance(0.3):
        case.plain["length_normalize"] = d.pick(True, False)
    paired(d, case, sizes, kept)


def kto_loss(d: Dice, case: Case) -> None:
    sizes, kept = preference(d, case, pairs=False)
    case.plain["desirable"] = d.yes(0.5, len(sizes))
    referenced(d, case, sizes, kept)
    x, desirable = case.plain, case.plain.pop("desirable")
    case.counts(
        "ref_logp", case.busy["ref_logp"] if x["ref_logp"].shape != x["targets"].shape else ~case.idle["ref_logp"]
    )
    x["desirable"] = desirable
    x["kl"] = d.pick(0.0, 0.3, -1, "tensor")
    x["kl"] = d.normal(dtype=d.floats()) if x["kl"] == "tensor" else x["kl"]
    if d.chance(0.4):
        x["beta"] = d.pick(0.1, 0.5, 1)
    if d.chance(0.3):
        x["desirable_weight"], x["undesirable_weight"] = d.pick(0.0, 1.5), d.pick(2, 0.5)
    if d.chance(0.4):
        x["num_sequences"] = count(d, int(alive(kept, sizes).sum()))
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


def orpo_loss(d: Dice, case: Case) -> None:
    sizes, kept = preference(d, case)
    if d.chance(0.5):
        case.plain["beta"] = d.pick(0.1, 0.5, 2)
    if d.chance(0.4):
        chosen = sums(kept.long(), sizes)[0::2].sum()
        case.plain["num_tokens"] = count(d, int(chosen))
    paired(d, case, sizes, kept)


def simpo_loss(d: Dice, case: Case) -> None:
    sizes, kept = preference(d, case)
    x = case.plain
    if d.chance(0.5):
        x["beta"] = d.pick(0.1, 2.0, 3)
    margins(d, case, sizes, kept)
    if d.chance(0.3):
        x["label_smoothing"] = d.pick(0.1, 0.5)
    if d.chance(0.3):
        x["sft_coef"] = d.pick(0.5, 1)
    paired(d, case, sizes, kept)


def by_token(stats: Any, cu: Tensor | None, *columns: Tensor) -> tuple[Tensor, dict]:
    """A weighted sum of all statistics; every token is a unit."""
    x = stats.logp - 0.3 * stats.entropy + 0.1 * stats.lse.square()
    x = x if stats.kl is None else x + 0.5 * stats.kl
    for column in columns:
        x = x * column.to(x.dtype)
    return x.sum(), {"entropy": (stats.entropy.detach().sum(), torch.tensor(float(x.numel()), dtype=x.dtype))}


def by_pair(stats: Any, cu: Tensor, *columns: Tensor) -> tuple[Tensor, dict]:
    """Of pairs of sequences: the last column is one per sequence."""
    *tokens, each = columns
    x = stats.logp
    for column in tokens:
        x = x * column.to(x.dtype)
    y = sums(x, cu.diff().tolist()) * each.to(x.dtype)
    return F.softplus(y[0::2] - y[1::2]).sum(), {"nll": ((-y).detach().sum(), y.new_tensor(max(y.numel(), 1)))}


def fused_loss(d: Dice, case: Case) -> None:
    in_pairs = d.chance(0.4)
    sizes = lengths(d, pairs=True) if in_pairs else None
    kept = rows(d, case, sizes)
    x, lead = case.plain, case.plain["targets"].shape
    x["objective"] = by_pair if in_pairs else by_token
    if d.chance(0.6):
        column = per_token(d, case, "per_token[0]", d.normal(*lead), kept)
        x["per_token"] = d.pick(tuple, list)([column])
    if in_pairs:
        assert sizes is not None
        x["cu_seqlens"], x["unit"] = boundaries(d, sizes), 2
        x["per_sequence"] = (d.normal(len(sizes), dtype=d.floats()),)
        case.counts("per_sequence[0]", alive(kept, sizes), torch.zeros(len(sizes), dtype=torch.bool))
    else:
        bounded(d, case, kept)
    if not in_pairs and d.chance(0.3):
        ref = heads.other_head(d, case)
        x["ref"] = ref
        heads.reference_counts(case, "ref[0]", "ref[1]", ref, kept)
        heads.reference_options(d, case, ref[1].shape[0])
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


DRAWS: dict[str, Callable[[Dice, Case], Any]] = {
    f.__name__: f
    for f in (
        ppo_loss, grpo_loss, sft_loss, dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss, fused_loss,
    )
}  # fmt: skip
