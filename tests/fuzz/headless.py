"""Valid calls of whatever never meets the head: value and reward losses, advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import Case, Dice, count, factors
from tests.fuzz.heads import NATIVE, boundaries, gradients, lengths
from tests.fuzz.losses import alive, reduced


def value_loss(d: Dice, case: Case) -> None:
    sizes = lengths(d) if d.chance(0.5) else None
    n = sum(sizes) if sizes is not None else d.whole(0, 12)
    lead, x = factors(d, n), case.plain
    x["values"], x["returns"] = (d.normal(*lead, dtype=d.floats()) for _ in range(2))
    kept = torch.ones(lead, dtype=torch.bool)
    if d.chance(0.5):
        x["mask"] = kept = d.yes(d.pick(0.0, 0.5, 0.8), *lead)
    if d.chance(0.5):
        x["old_values"] = d.normal(*lead, dtype=d.floats())
        if d.chance(0.8):
            x["clip"] = d.pick(0.2, 1, None)
    for name in ("values", "returns"):
        case.counts(name, kept)
    if "old_values" in x:
        looked_at = kept if x.get("clip") is not None else torch.zeros_like(kept)
        case.counts("old_values", looked_at, ~kept)
    reduced(d, case, kept.reshape(-1), sizes, cu_given=False)
    if d.chance(0.1):
        x["checks"] = d.pick(True, False)
    gradients(d, case, "values")


def grouped(d: Dice, case: Case, size: int | None = None) -> Tensor:
    """Scores and groups; [S] ids of the groups."""
    x = case.plain
    if size is None and d.chance(0.5):
        s = d.whole(0, 8)
        ids = d.ids(4, s) * d.pick(1, 1000) - d.pick(0, 2)
        x["scores"], x["groups"] = d.normal(s, dtype=d.floats()), ids.to(d.pick(torch.int64, torch.int32, torch.int16))
    else:
        k = size or d.whole(1, 4)
        s = k * d.whole(0, 3)
        ids = torch.arange(s) // k
        x["scores"], x["groups"] = d.normal(s, dtype=d.floats()), k
    if d.chance(0.15):
        x["scores"] = x["scores"].round()  # ties
    return ids


def ranked(d: Dice, s: int) -> Tensor:
    return d.ids(4, s).to(d.pick(torch.int64, torch.int32, torch.float32, torch.uint8, torch.bfloat16)) + d.pick(0, 1)


def counted(ids: Tensor, living: Callable[[Tensor], Any]) -> Tensor:
    """[S] bool: members of groups that count; ``living`` says so of the members' positions."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for i in ids.unique():
        members = (ids == i).nonzero().flatten()
        found[members] = bool(living(members))
    return found


def over_groups(d: Dice, case: Case, busy: Tensor, ids: Tensor) -> None:
    case.counts("scores", busy, torch.zeros_like(busy))
    if d.chance(0.4):
        case.plain["num_groups"] = count(d, ids[busy].unique().numel())
    gradients(d, case, "scores")


def bradley_terry_loss(d: Dice, case: Case) -> None:
    plain_pairs = d.chance(0.5)
    ids = grouped(d, case, 2 if plain_pairs else None)
    x, s = case.plain, case.plain["scores"].numel()
    if plain_pairs:
        if d.chance(0.7):
            x.pop("groups")
        if d.chance(0.5):
            x["margin"] = d.pick(0.5, -1, d.normal(s // 2, dtype=d.floats()))
            if isinstance(x["margin"], Tensor):
                case.counts("margin", torch.ones(s // 2, dtype=torch.bool))
        busy = torch.ones(s, dtype=torch.bool)
    else:
        x["ranks"] = ranks = ranked(d, s)
        if d.chance(0.3):
            x["margin"] = d.pick(0.5, 0)
        busy = counted(ids, lambda m: ranks[m].unique().numel() > 1)
        case.counts("ranks", busy, torch.zeros_like(busy))
    if d.chance(0.3):
        x["center_coef"] = d.pick(0.01, 1)
    if d.chance(0.3):
        x["label_smoothing"] = d.pick(0.1, 0.5)
    over_groups(d, case, busy, ids)


def plackett_luce_loss(d: Dice, case: Case) -> None:
    ids = grouped(d, case)
    x = case.plain
    x["ranks"] = ranked(d, ids.numel())
    case.plain = {"scores": x.pop("scores"), "ranks": x.pop("ranks"), **x}
    if d.chance(0.4):
        case.plain["top"] = d.pick(1, 2, 100, None)
    busy = counted(ids, lambda m: len(m) > 1)
    case.counts("ranks", busy, torch.zeros_like(busy))
    over_groups(d, case, busy, ids)


def infonce_loss(d: Dice, case: Case) -> None:
    ids = grouped(d, case)
    x = case.plain
    positive = d.yes(0.4, ids.numel())
    case.plain = {"scores": x.pop("scores"), "positive": positive, **x}
    if d.chance(0.4):
        case.plain["temperature"] = d.pick(0.5, 2)
    over_groups(d, case, counted(ids, lambda m: 0 < positive[m].sum() < len(m)), ids)


def masked(d: Dice, case: Case, n: int) -> Tensor:
    if not d.chance(0.6):
        return torch.ones(n, dtype=torch.bool)
    case.plain["mask"] = d.yes(d.pick(0.0, 0.5, 0.8), n)
    return case.plain["mask"]


def gae(d: Dice, case: Case) -> None:
    sizes = lengths(d)
    n, x = sum(sizes), case.plain
    x["rewards"], x["values"] = d.normal(n, dtype=d.floats()), d.normal(n, dtype=d.floats())
    x["cu_seqlens"] = boundaries(d, sizes)
    kept = masked(d, case, n)
    x["rewards"] = x["rewards"].where(kept, 0.0)
    case.counts("rewards", kept, torch.zeros_like(kept))
    case.counts("values", kept)
    if d.chance(0.5):
        x["gamma"] = d.pick(0.0, 0.9, 1)
    if d.chance(0.5):
        x["lam"] = d.pick(0.0, 0.5, 1)
    if d.chance(0.4):
        x["bootstrap"] = d.normal(len(sizes), dtype=d.floats())
        case.counts("bootstrap", alive(kept, sizes), torch.zeros(len(sizes), dtype=torch.bool))
    if d.chance(0.4):
        x["whiten"] = d.pick(True, False)
    if d.chance(0.1):
        x["checks"] = d.pick(True, False)


def shaped_rewards(d: Dice, case: Case) -> None:
    sizes = lengths(d)
    n, x = sum(sizes), case.plain
    x["scores"] = d.normal(len(sizes), dtype=d.floats())
    x["logp"], x["ref_logp"] = -d.uniform(n, dtype=d.floats()), -d.uniform(n, dtype=d.floats())
    x["cu_seqlens"] = boundaries(d, sizes)
    kept = masked(d, case, n)
    case.counts("scores", alive(kept, sizes), torch.zeros(len(sizes), dtype=torch.bool))
    case.counts("logp", kept)
    case.counts("ref_logp", kept)
    x["beta"] = d.pick(0.0, 0.5, 1, torch.tensor(d.pick(0.0, 0.25, 2.0), dtype=d.floats()))
    if d.chance(0.6):
        x["kl"] = d.pick("k1", "k2", "k3")
    if d.chance(0.3):
        x["kl_clip"] = d.pick(0.1, 1, None)
    if d.chance(0.1):
        x["checks"] = d.pick(True, False)


def group_advantages(d: Dice, case: Case) -> None:
    ids = grouped(d, case)
    x = case.plain
    if d.chance(0.6):
        x["baseline"] = d.pick("mean", "leave_one_out")
    if d.chance(0.7):
        x["scale"] = d.pick("group_std", "batch_std", None)
    if d.chance(0.3):
        x["eps"] = d.pick(1e-4, 1)
    busy = counted(ids, lambda m: len(m) > 1)
    case.counts("scores", busy, torch.zeros_like(busy))


def whiten(d: Dice, case: Case) -> None:
    lead = factors(d, d.whole(0, 12))
    x = case.plain
    x["x"] = d.normal(*lead, dtype=d.floats()) * d.pick(1e-3, 1.0, 10.0) + d.pick(0.0, 3.0)
    kept = torch.ones(lead, dtype=torch.bool)
    if d.chance(0.6):
        x["mask"] = kept = d.yes(d.pick(0.0, 0.5, 0.8), *lead)
    case.counts("x", kept)
    if d.chance(0.3):
        x["shift_mean"] = d.pick(True, False)
    if d.chance(0.3):
        x["eps"] = d.pick(1e-5, 1)


def warmup(d: Dice, case: Case) -> None:
    x = case.plain
    x["hidden_size"], x["vocab_size"], x["dtype"] = d.whole(1, 8), d.whole(1, 40), d.pick(*FLOATS)
    if d.chance(0.4):
        x["device"] = d.pick("cpu", torch.device("cpu"))
    if d.chance(0.7):
        x["backend"] = d.pick("eager", NATIVE, "auto")


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DRAWS: dict[str, Callable[[Dice, Case], Any]] = {
    f.__name__: f
    for f in (
        value_loss, bradley_terry_loss, plackett_luce_loss, infonce_loss, gae, shaped_rewards, group_advantages, whiten,
        warmup,
    )
}  # fmt: skip
