"""Every function once more, from ``rlhf_kernels.reference``: arguments by name in, outputs by name out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import reference
from rlhf_kernels.reference.losses import reduce
from tests.fuzz import metrics

Args = dict[str, Any]
Outputs = dict[str, Tensor]

HEAD = ("bias", "temperature", "softcap", "logit_scale", "vocab_size", "ignore_index", "dtype")
PAIRED = ("dpo_loss", "ipo_loss", "kto_loss", "orpo_loss", "simpo_loss")
HEADED = (
    "token_stats", "token_stats_from_logits", "token_logps", "kl_divergence", "ppo_loss", "grpo_loss", "sft_loss",
    "fused_loss", *PAIRED,
)  # fmt: skip


def head_of(x: Args) -> Args:
    return {name: x[name] for name in HEAD if x.get(name) is not None}


class FullStats(NamedTuple):
    """As the library's."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    mean_logit: Tensor | None = None
    top1: Tensor | None = None
    kl: Tensor | None = None


def _kl(x: Args) -> Tensor:
    ref_head = x.get("ref_head")
    if ref_head is None:  # then it is as the policy's
        ref_head = {k: x[k] for k in ("softcap", "logit_scale") if x.get(k) is not None}
    direction = x.get("direction", "reverse")
    if direction not in ("reverse", "forward"):
        raise ValueError("direction")
    args = (x[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight", "targets"))
    ref_head = {k: v for k, v in ref_head.items() if v is not None}
    return reference.kl_divergence(*args, direction=direction, ref_head=ref_head, **head_of(x))


def _with_reference(x: Args) -> Args:
    """The arguments of an exact KL, from those of a loss with ``ref``."""
    both = {"ref_hidden": x["ref"][0], "ref_weight": x["ref"][1], "ref_head": x.get("ref_head")}
    return {**{k: x[k] for k in ("hidden", "weight", "targets")}, **head_of(x), **both}


def _objective(x: Args) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The caller's objective over the rows that are kept."""
    stats = reference.token_stats(x["hidden"], x["weight"], x["targets"], **head_of(x))
    kept = metrics.kept_of(x)
    some = [s.flatten()[kept] for s in stats]
    if x.get("ref") is not None:
        some.append(_kl(_with_reference(x)).flatten()[kept])
    cu = None
    if x.get("cu_seqlens") is not None:
        bounds = x["cu_seqlens"].tolist()
        if bounds[0] != 0 or bounds[-1] != kept.numel():
            raise ValueError("cu_seqlens")
        cu = torch.tensor([0] + [int(kept[a:b].sum()) for a, b in pairwise(bounds)]).cumsum(0)
    columns = [c.reshape(-1)[kept].double() for c in x.get("per_token") or ()]
    return x["objective"](FullStats(*some), cu, *columns, *(c.double() for c in x.get("per_sequence") or ()))


def _from_logits(x: Args) -> Any:
    rest = {k: v for k, v in x.items() if k != "logits"}
    return reference.token_stats(x["logits"], torch.eye(x["logits"].shape[-1], dtype=x["logits"].dtype), **rest)


def _policy(x: Args) -> Tensor:
    """The reference has one head for both in an exact KL, so options are those of neither (``draw`` sees to it)."""
    x = dict(x)
    if x.pop("ref_head", None) not in (None, {}):
        raise ValueError("ref_head")
    x.setdefault("old_logp", None)
    if x.get("kl") != "exact":
        return reference.ppo_loss(**_reduction(x))
    coef, ref = x.pop("kl_coef", 0.0), x.pop("ref", None)
    plain = reference.ppo_loss(**_reduction({**x, "kl": "k3", "kl_coef": 0.0}))
    if not coef:
        return plain
    kl = _kl(_with_reference({**x, "ref": ref, "ref_head": {}})).flatten()
    if x.get("token_weight") is not None:
        kl = kl * x["token_weight"].flatten().double().where(metrics.kept_of(x), 0.0)
    y = _reduction(x)
    over: Args = {k: y.get(k) for k in ("num_tokens", "num_sequences", "cu_seqlens")}
    over |= {"reduction": y.get("reduction", "token_mean"), "ignore_index": x.get("ignore_index", -100)}
    return plain + coef * reduce(kl, x["targets"].flatten(), **over)


def _reduction(x: Args) -> Args:
    """A sum over sequences with a denominator needs no boundaries: every row may be one."""
    if x.get("reduction") == "sequence_sum" and x.get("cu_seqlens") is None and x.get("num_sequences") is not None:
        x = {**x, "cu_seqlens": torch.arange(x["targets" if "targets" in x else "values"].numel() + 1)}
    if x.get("reduction", "token_mean") not in ("token_mean", "sequence_mean", "sequence_sum"):
        raise ValueError("reduction")
    return x


def _plain(name: str) -> Callable[[Args], Any]:
    def of(x: Args) -> Any:
        if name in PAIRED and x["cu_seqlens"].numel() == 1:  # no sequence at all
            return (x["hidden"].sum() + x["weight"].sum() + sum(x.get("bias", torch.zeros(1)))) * 0.0
        return getattr(reference, name)(**x)

    return of


ORACLES: dict[str, Callable[[Args], Any]] = {
    name: _plain(name)
    for name in (
        *PAIRED, "token_stats", "token_logps", "bradley_terry_loss", "plackett_luce_loss", "infonce_loss", "gae",
        "shaped_rewards", "group_advantages", "whiten",
    )
} | {
    "token_stats_from_logits": _from_logits,
    "kl_divergence": _kl,
    "fused_loss": lambda x: _objective(x)[0],
    "ppo_loss": _policy,
    "grpo_loss": _policy,
    "sft_loss": lambda x: reference.sft_loss(**_reduction(x)),
    "warmup": lambda x: (),
    "value_loss": lambda x: reference.value_loss(**_reduction(x)),
}  # fmt: skip


def named(out: Any) -> Outputs:
    """Whatever comes out, by name."""
    if isinstance(out, Tensor):
        return {"loss" if out.dim() == 0 else "out": out}
    if isinstance(out, str):  # the name of a backend
        return {}
    if hasattr(out, "_asdict"):
        return {k: v for k, v in out._asdict().items() if isinstance(v, Tensor)}
    return {str(i): v for i, v in enumerate(out)}


def outputs(function: str, x: Args) -> Outputs:
    """Statistics, or a loss and what it logs."""
    found = named(ORACLES[function](dict(x)))
    if not function.endswith("_loss"):
        return found
    with torch.no_grad():
        if function == "fused_loss":
            logged = {name: total / count for name, (total, count) in _objective(x)[1].items()}
        elif function in ("ppo_loss", "grpo_loss"):
            logged = metrics.policy(x, None if x.get("ref") is None else _kl(_with_reference(x)))
        else:
            logged = metrics.METRICS[function](x)
    return found | {f"metrics.{name}": m.detach() for name, m in logged.items()}
