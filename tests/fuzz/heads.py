"""Valid calls of whatever meets the head: rows, options, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import reference
from tests.fuzz.draw import HALF, Case, Dice, factors
from tests.fuzz.oracle import head_of

NATIVE = "native" if rk.backends()["native"] == "ok" else "eager"  # where there is no compiler


def lengths(d: Dice, pairs: bool = False, filled: bool = False) -> list[int]:
    """Of a few sequences; ``filled``: none of them is empty."""
    many = d.pick(0, 1, 2, 3, 4, 4)
    many = 2 * min(many, 3) if pairs else many
    return [d.whole(1 if filled else 0, 3 if many > 3 else 4) for _ in range(many)]


def boundaries(d: Dice, sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(d.pick(torch.int64, torch.int32))


def rows(d: Dice, case: Case, sizes: list[int] | None = None) -> Tensor:
    """Puts hidden, weight, targets and options of the head into a case; returns [N] bool, what is kept."""
    dtype = d.pick(*(torch.float32,) * 4, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)
    n = d.pick(0, 1, 2, 5, 12, d.whole(1, 12)) if sizes is None else sum(sizes)
    h, v = d.pick(1, 2, 8, d.whole(1, 8)), d.pick(1, 2, 40, d.whole(1, 40), d.whole(1, 40))
    lead = factors(d, n)
    hidden = d.normal(n, h, dtype=dtype)
    if n > 1 and d.chance(0.06):
        hidden = hidden[:1].expand(n, h)
    scale = d.pick(0.5, 2.0, 2.0, 6.0, 30.0)
    if case.function == "orpo_loss":  # the log odds of what is nearly certain hang on digits that float32 has not
        scale = min(scale, 2.0)
    weight = (d.normal(v, h) * scale / math.sqrt(h)).to(dtype)
    vocab = v if d.chance(0.8) else d.whole(1, v)
    ignore = d.pick(-100, -100, -100, -100, -1, 0, vocab - 1, v + 5)
    targets = d.ids(vocab, n).masked_fill(d.yes(d.pick(0.0, 0.3, 0.3, 0.6, 1.0), n), ignore)
    if sizes and d.chance(0.2):  # a whole sequence
        start = d.whole(0, len(sizes) - 1)
        targets[sum(sizes[:start]) : sum(sizes[: start + 1])] = ignore
    kept = targets != ignore
    x = case.plain
    x["hidden"], x["weight"] = hidden.reshape(*lead, h).contiguous(), weight
    x["targets"] = targets.view(lead).to(d.pick(torch.int64, torch.int64, torch.int32))
    if vocab != v:
        x["vocab_size"] = vocab
    if ignore != -100:
        x["ignore_index"] = ignore
    matters = kept.any() & (torch.arange(v) < vocab)
    case.counts("hidden", kept.view(*lead, 1).expand(*lead, h))
    case.counts("weight", matters[:, None].expand(v, h), (torch.arange(v) >= vocab)[:, None].expand(v, h))
    options(d, case, kept)
    autocast(d, case)
    return kept


def options(d: Dice, case: Case, kept: Tensor) -> None:
    x = case.plain
    lead, dtype, v = x["targets"].shape, x["hidden"].dtype, x["weight"].shape[0]
    if d.chance(0.25):
        x["bias"] = d.normal(v, dtype=dtype)
        case.busy["bias"], case.idle["bias"] = case.busy["weight"][:, 0], case.idle["weight"][:, 0]
    if d.chance(0.35):
        x["temperature"] = d.pick(0.7, 2, 1, "each")
        if x["temperature"] == "each":
            x["temperature"] = 0.5 + d.uniform(*lead, dtype=d.floats())
            case.counts("temperature", kept.view(lead))
    if d.chance(0.2):
        x["softcap"] = d.pick(3.0, 15, 30.0)
    if d.chance(0.2):
        x["logit_scale"] = d.pick(0.25, -1.5, 2)
    x["backend"] = d.pick("eager", NATIVE, NATIVE, "auto")
    if d.chance(0.5):
        x["max_bytes"] = d.pick(None, 1, 200, 7 * v * 8, 10**6, 10**12)
    if d.chance(0.12):
        x["tolerance"] = d.pick(None, 1e-3, 0.2)
    if d.chance(0.1):
        x["checks"] = d.pick(True, False)


def autocast(d: Dice, case: Case) -> None:
    x = case.plain
    if x["hidden"].dtype == torch.float64 or not d.chance(0.12):
        return
    case.autocast = d.pick(*HALF)
    for name in ("hidden", "weight", "bias"):  # it makes one of all of them
        if name in x and d.chance(0.3):
            x[name] = x[name].to(d.pick(torch.float32, *HALF))


def bounded(d: Dice, case: Case, kept: Tensor) -> None:
    """``max_targets``, where no whole sequences are needed."""
    if d.chance(0.12):
        case.plain["max_targets"] = max(1, int(kept.sum()) + d.pick(0, 0, 1, 100))


def buffer(d: Dice, case: Case) -> None:
    """``weight_grad``, and the factor that the loss will be multiplied by."""
    if d.chance(0.12) and case.autocast is None:
        x = case.plain
        full = torch.float64 if x["hidden"].dtype == torch.float64 else torch.float32
        x["weight_grad"] = d.normal(*x["weight"].shape, dtype=full)
        if d.chance(0.7):
            x["loss_scale"] = d.pick(0.5, -3.0, 2)


def gradients(d: Dice, case: Case, *names: str) -> None:
    """Which leaves there are, and in what mode the call is made."""
    case.wanted = tuple(name for name in names if name in case.plain and d.chance(0.8))
    case.mode = d.pick(*("grad",) * 8, "no_grad", "inference")


def true_logp(case: Case) -> Tensor:
    """[...] what the policy says, float64."""
    x = case.plain
    return reference.token_stats(x["hidden"], x["weight"], x["targets"].long(), **head_of(x)).logp


def per_token(d: Dice, case: Case, name: str, x: Tensor, kept: Tensor) -> Tensor:
    """[...] floats, of which those at ignored rows never matter."""
    lead = case.plain["targets"].shape
    case.counts(name, kept.view(lead))
    return x.reshape(lead).to(d.floats())


def other_head(d: Dice, case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states and weight of a reference, of any width."""
    x = case.plain
    lead, v, width = x["targets"].shape, x["weight"].shape[0], d.whole(1, 6)
    v = x["vocab_size"] + d.whole(0, 3) if "vocab_size" in x else v
    dtype = x["hidden"].dtype
    return d.normal(*lead, width, dtype=dtype), (d.normal(v, width) * 2 / math.sqrt(width)).to(dtype)


def reference_counts(case: Case, hidden: str, weight: str, ref: tuple[Tensor, Tensor], kept: Tensor) -> None:
    lead, vocab = case.plain["targets"].shape, case.plain.get("vocab_size", ref[1].shape[0])
    case.counts(hidden, kept.view(*lead, 1).expand(ref[0].shape))
    real = (torch.arange(ref[1].shape[0]) < vocab)[:, None].expand(ref[1].shape)
    case.counts(weight, real & kept.any(), ~real)


def reference_options(d: Dice, case: Case, v: int) -> None:
    """``ref_head``; it must be given where the policy's head has a bias."""
    x = case.plain
    if "bias" in x or d.chance(0.4):
        x["ref_head"] = {}
        if d.chance(0.5):
            x["ref_head"]["bias"] = d.normal(v, dtype=x["hidden"].dtype)
        if d.chance(0.3):
            x["ref_head"]["softcap"] = d.pick(4.0, 20)
        if d.chance(0.3):
            x["ref_head"]["logit_scale"] = d.pick(0.5, -1, 2.0)
    elif d.chance(0.3):
        x["ref_head"] = None


def token_stats(d: Dice, case: Case) -> None:
    kept = rows(d, case)
    bounded(d, case, kept)
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


def token_stats_from_logits(d: Dice, case: Case) -> None:
    kept = rows(d, case)
    x = case.plain
    hidden, weight = x.pop("hidden"), x.pop("weight")
    logits = (hidden.double() @ weight.double().T).to(hidden.dtype)
    case.plain = {"logits": logits, **x}
    if "bias" in x:  # ready logits meet no product, so autocast leaves them as they are
        case.plain["bias"] = x["bias"].to(logits.dtype)
    case.plain.pop("tolerance", None)
    real = (torch.arange(logits.shape[-1]) < x.get("vocab_size", logits.shape[-1])).expand(logits.shape)
    alive = kept.view(*logits.shape[:-1], 1).expand(logits.shape)
    case.counts("logits", alive & real)
    if d.chance(0.3):  # columns that do not exist have no gradient that could be written over them
        case.plain["overwrite"] = d.pick(True, False) and "vocab_size" not in x
    bounded(d, case, kept)
    gradients(d, case, "logits", "bias")


def token_logps(d: Dice, case: Case) -> None:
    rows(d, case)
    x = case.plain
    lead, vocab = x["targets"].shape, x.get("vocab_size", x["weight"].shape[0])
    ignore, k = x.get("ignore_index", -100), d.pick(1, 3)
    ids = d.ids(vocab, *lead, k).masked_fill(d.yes(0.2, *lead, k), ignore)
    ids = torch.where((x.pop("targets") == ignore)[..., None], ignore, ids).to(d.pick(torch.int64, torch.int32))
    case.plain = {"hidden": x.pop("hidden"), "weight": x.pop("weight"), "token_ids": ids, **x}
    kept = (ids != ignore).any(-1)
    v, h = case.plain["weight"].shape
    case.counts("hidden", kept[..., None].expand(*lead, h))
    real = torch.arange(v) < vocab
    case.counts("weight", (real & kept.any())[:, None].expand(v, h), (~real)[:, None].expand(v, h))
    if "bias" in x:
        case.counts("bias", real & kept.any(), ~real)
    if isinstance(x.get("temperature"), Tensor):
        case.counts("temperature", kept)
    bounded(d, case, kept)
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


def kl_divergence(d: Dice, case: Case) -> None:
    kept = rows(d, case)
    x = case.plain
    ref = other_head(d, case)
    case.plain = {"hidden": x.pop("hidden"), "weight": x.pop("weight"), "ref_hidden": ref[0], "ref_weight": ref[1], **x}
    reference_counts(case, "ref_hidden", "ref_weight", ref, kept)
    if d.chance(0.7):
        case.plain["direction"] = d.pick("reverse", "forward")
    reference_options(d, case, ref[1].shape[0])
    bounded(d, case, kept)
    buffer(d, case)
    gradients(d, case, "hidden", "weight", "bias")


DRAWS: dict[str, Callable[[Dice, Case], Any]] = {
    f.__name__: f for f in (token_stats, token_stats_from_logits, token_logps, kl_divergence)
}
