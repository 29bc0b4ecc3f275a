"""Several named rewards at once, each kept in its range and logged apart, so that trade-offs show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.address import redacted
from trainer.rewards import Reward, check_source, is_model, reward_from
from trainer.rollout import Rollout
from trainer.shaping import RewardOptions, combined, ranged

WORST = -2.0  # of normalised scores
ITEM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sources>.+?)(?:@(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?))?")


class Aspect(NamedTuple):
    """What a response can be good at."""

    name: str
    weight: float
    sources: tuple[str, ...]  # more than one is an ensemble


def aspects_of(reward: str | Sequence[str]) -> list[Aspect]:
    """Reads ``[NAME=]SOURCE[,SOURCE...][@WEIGHT]``, once or several times.

    Raises:
        ValueError: Nothing is given, a weight is not a number, a source is empty, or two aspects share a name.

    Example:
        >>> aspects_of(["runs/a,runs/b", "brief=my:brief@0.5"])[1]
        Aspect(name='brief', weight=0.5, sources=('my:brief',))
    """
    items = [reward] if isinstance(reward, str) else list(reward)
    if not items:
        raise ValueError("reward: want at least one")
    found = []
    for i, item in enumerate(items):
        if Path(item).exists():  # a folder may be called anything
            found.append(Aspect("reward" if len(items) == 1 else f"reward_{i + 1}", 1.0, (item,)))
            continue
        match = ITEM.fullmatch(item.strip())
        sources = tuple(match["sources"].split(",")) if match else ()
        if match is None or not all(sources):
            raise ValueError(f"reward: got {redacted(item)!r}, want [NAME=]SOURCE[,SOURCE...][@WEIGHT]")
        try:
            weight = float(match["weight"] or 1.0)
        except ValueError:
            got = f"got the weight {match['weight']!r} in {redacted(item)!r}"
            raise ValueError(f"reward: {got}, want a number") from None
        name = match["name"] or ("reward" if len(items) == 1 else f"reward_{i + 1}")
        found.append(Aspect(name, weight, sources))
    names = [a.name for a in found]
    if len(set(names)) < len(names):
        raise ValueError(f"reward: got the names {', '.join(names)}, want each once")
    return found


def sources_of(config: Any) -> list[tuple[str, str]]:
    """Every reward and judge that the options of a stage name, each with its option."""
    found: list[tuple[str, str]] = []
    for option in ("reward", "gold_reward", "judge"):
        if value := getattr(config, option, None):
            names = [s for a in aspects_of(value) for s in a.sources] if option == "reward" else [value]
            found += [(option, name) for name in names]
    return found


def check_sources(config: Any) -> None:
    """Refuses rewards and judges that cannot be asked; imports functions, where that is allowed.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    for option, name in sources_of(config):
        check_source(name, option, load=True)


def truncation_score(cfg: RewardOptions) -> float | None:
    """The fixed score of truncated responses; None is the lowest score of their rollout.

    Reward models give deviations from the mean of the policy that they were made for; of a function's scale nothing is
    known, and a fixed number could outweigh everything that it has to say.
    """
    sources = [source for aspect in aspects_of(cfg.reward) for source in aspect.sources]
    known = cfg.truncation_score is not None or not all(map(is_model, sources))
    return cfg.truncation_score if known else WORST


class Rewards:
    """The weighted sum of all aspects; itself a ``Reward``.

    Args:
        cfg: Names the rewards and says how they are combined.
        tokenizer: Of the policy.
        device: Where reward models go.

    Attributes:
        logged: About the last call, and only where there is more to say than the sum: ``rewards/NAME`` and
            ``rewards/NAME_std`` before weights, and ``rewards/NAME_spread``, the deviation between members of an
            ensemble.
    """

    def __init__(self, cfg: RewardOptions, tokenizer: Any, device: torch.device) -> None:
        self.cfg, self.logged = cfg, {}
        self.aspects = aspects_of(cfg.reward)
        options: dict[str, Any] = {"max_length": cfg.max_length, "max_tokens": cfg.max_tokens, "device": device}
        self.sources: list[list[Reward]] = [
            [reward_from(source, tokenizer, **options) for source in aspect.sources] for aspect in self.aspects
        ]

    def __call__(self, rollout: Rollout, records: Sequence[dict[str, Any]]) -> Tensor:
        """[S] float32."""
        self.logged: dict[str, float] = {}
        total: Tensor | None = None
        for aspect, sources in zip(self.aspects, self.sources, strict=True):
            members = [source(rollout, records) for source in sources]
            scores = members[0]
            if len(members) > 1:
                stacked = torch.stack([x.to(scores.device) for x in members])
                scores = combined(self.cfg, stacked)
                self.logged[f"rewards/{aspect.name}_spread"] = float(stacked.std(0, unbiased=False).mean())
            if len(self.aspects) > 1:
                self.logged[f"rewards/{aspect.name}"] = float(scores.mean())
                self.logged[f"rewards/{aspect.name}_std"] = float(scores.std(unbiased=False))
            part = aspect.weight * ranged(self.cfg, scores)
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total
