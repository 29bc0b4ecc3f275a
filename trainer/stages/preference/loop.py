"""Learning from preferences without sampling: the loop that DPO, IPO, KTO, ORPO and SimPO share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rlhf_kernels as rk
from trainer.base.statistics import Estimate, proportion
from trainer.data import reading as data
from trainer.data.cursor import Cursor
from trainer.models.policy import Policy
from trainer.models.rendering import render_as
from trainer.models.router import balanced, say_if_without
from trainer.run.log import RunLog
from trainer.stages.preference.reference import Reference, reference_model
from trainer.stages.preference.replies import Part, Replies, ReplyTotals, Unit, parts_of, totals_of
from trainer.training.defaults import decided
from trainer.training.optimizer import Optimizer
from trainer.training.options import TokenConfig
from trainer.training.precision import autocast
from trainer.training.progress import Progress
from trainer.training.session import Session
from trainer.training.setup import fitted, policy_for, prepare

NAMES = {
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "logp/chosen": "logps/chosen",
    "logp/rejected": "logps/rejected",
    "nll": "nll_loss",
}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TokenConfig):
    """Options of every stage that learns from preferences."""

    batch_size: int = 64
    """Pairs, or labelled replies, per step."""
    eval_data: Path | None = None
    """Held-out preferences, for the table at the end."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(PreferenceConfig):
    """Options of those that hold the policy near a reference."""

    beta: float = 0.1
    """Strength of the pull to the reference."""
    reference: str | None = None
    """A local directory or hub id; by default the model as it starts."""
    reference_once: bool = True
    """Score all replies before training and let the reference go, rather than score them at every step."""


class PreferenceMethod:
    """What one stage adds to the loop."""

    name: str
    """Of the stage."""
    kind: data.Kind
    """Of its records."""

    max_length: int
    """Tokens per sample."""

    def encode(
        self, tokenizer: Any, records: Sequence[dict[str, Any]], note: Callable[[str], None] | None = None
    ) -> Replies:
        """Records as token sequences; ``note`` is told what is cut and left out."""
        raise NotImplementedError

    def before(
        self, policy: Policy, replies: Replies, units: Sequence[Unit], parts: Callable[[Sequence[Unit]], list[Part]]
    ) -> None:
        """Called before each step, without gradients.

        Args:
            policy: As it is before the step.
            replies: All of them.
            units: Those of the step.
            parts: Makes micro-batches of any units.
        """

    def loss(self, policy: Policy, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        """Loss of one micro-batch under the denominators of the whole step; metrics are means over its units."""
        raise NotImplementedError


class Known(NamedTuple):
    """Replies and what the reference, where there is one, thinks of them."""

    replies: Replies
    reference: Reference | None


@dataclass
class PreferenceState(Progress):
    """Everything that a step changes."""

    policy: Policy
    optimizer: Optimizer
    cursor: Cursor


class PreferenceLoop:
    """One run: what stays as it is, and ``state``, which does not.

    Args:
        cfg: The configuration.
        method: What the stage adds.
        note: Receives messages about the data.
    """

    def __init__(self, cfg: PreferenceConfig, method: PreferenceMethod, note: Callable[[str], None]) -> None:
        self.cfg = cfg = decided(cfg)
        self.method, self.device = method, prepare(cfg)
        render = render_as(cfg)
        records = data.read(cfg.data, method.kind, render=render, note=note)
        policy = policy_for(cfg, [r["prompt"] + " " + x for r in records for x in r["responses"]], self.device)
        say_if_without(policy, note)
        model = reference_model(policy, cfg.reference) if isinstance(cfg, ReferenceConfig) else None
        for seen in filter(None, (policy, model)):
            self.cfg = cfg = fitted(cfg, seen, note)
        method.max_length = min(method.max_length, cfg.max_length)

        def known(records: Sequence[dict[str, Any]]) -> Known:
            replies = method.encode(policy.tokenizer, records, note)
            if model is None or not isinstance(cfg, ReferenceConfig):
                return Known(replies, None)
            return Known(replies, Reference(cfg, model, replies.samples, once=cfg.reference_once))

        self.train = known(records)
        self.held_out = (
            known(data.read(cfg.eval_data, method.kind, render=render, note=note))
            if cfg.eval_data is not None
            else None
        )
        cursor = Cursor(len(self.train.replies.units), cfg.batch_size, cfg.seed)
        self.state = PreferenceState(policy, Optimizer(cfg, policy, cfg.steps, name="policy"), cursor)

    def step(self) -> dict[str, float]:
        """One optimizer step; returns what to log."""
        s = self.state
        units = self.train.replies.units
        parts, totals = self.ready(self.train, [units[i] for i in s.cursor.next()])

        def loss(part: Part) -> rk.LossOutput:
            return balanced(s.policy, part.totals.units / totals.units, lambda: self.loss(part, totals))

        return with_margins(s.optimizer.step(parts, loss, [p.totals.units for p in parts]))

    def ready(self, known: Known, units: Sequence[Unit]) -> tuple[list[Part], ReplyTotals]:
        """Micro-batches and denominators of some units, everything known that their loss needs."""

        def parts(units: Sequence[Unit]) -> list[Part]:
            return parts_of(known.replies, units, known.reference, self.cfg.max_tokens, self.device)

        with torch.no_grad(), autocast(self.cfg, self.device):
            self.method.before(self.state.policy, known.replies, units, parts)
        found = parts(units)
        return found, totals_of(found)

    def loss(self, part: Part, totals: ReplyTotals) -> rk.LossOutput:
        """The method's loss, with its metrics under the field's names, made to average over units."""
        with autocast(self.cfg, self.device):
            out = self.method.loss(self.state.policy, part, totals)
        return rk.LossOutput(out.loss, {NAMES.get(k, k): x for k, x in per_unit(out.metrics, part, totals).items()})

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss and metrics on the held-out replies; of pairs, the accuracy with its interval."""
        assert self.held_out is not None
        parts, totals = self.ready(self.held_out, self.held_out.replies.units)
        sums: dict[str, float] = {}
        for part in parts:
            out = self.loss(part, totals)
            sums["loss"] = sums.get("loss", 0.0) + float(out.loss)
            for name, x in out.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(x) * part.totals.units / totals.units
        found: dict[str, Any] = {"held_out_" + k.replace("/", "_"): v for k, v in with_margins(sums).items()}
        if "held_out_rewards_accuracies" in found:
            right = round(found.pop("held_out_rewards_accuracies") * totals.units)
            found["held_out_accuracy"] = proportion(right, totals.units)
        return found


def per_unit(metrics: dict[str, Any], part: Part, totals: ReplyTotals) -> dict[str, Any]:
    """The optimizer averages over units; what is a mean over tokens or labels is scaled to come out exact.

    The mean over no label at all is left out: a zero would read as a measurement.
    """
    mine, each = part.totals, totals.units / part.totals.units
    counts = {"nll": (mine.tokens, totals.tokens)}
    if "accuracy" not in metrics:  # replies with labels, not pairs
        bad, all_bad = mine.units - mine.good, totals.units - totals.good
        counts |= {"rewards/chosen": (mine.good, totals.good), "rewards/rejected": (bad, all_bad)}
    shares = {name: n / of * each for name, (n, of) in counts.items() if of}
    return {name: x * shares.get(name, 1.0) for name, x in metrics.items() if name in shares or name not in counts}


def with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """Adds the difference of rewards where replies come one by one, and there are some of both kinds."""
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys() and "rewards/margins" not in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def check_preference(cfg: PreferenceConfig) -> None:
    """Refuses values without a meaning, before the reference has scored anything.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    if not getattr(cfg, "beta", 1.0) > 0:
        raise ValueError(f"beta: got {cfg.beta}, want a positive number")  # type: ignore[attr-defined]
    for name in ("sft_coef", "desirable_weight", "undesirable_weight"):
        if not getattr(cfg, name, 0.0) >= 0:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want zero or more")
    if not 0 <= (eps := getattr(cfg, "label_smoothing", 0.0)) <= 0.5:
        raise ValueError(f"label_smoothing: got {eps}, want a rate of wrong labels, 0 to 0.5")


def train_preference(
    cfg: PreferenceConfig, method: PreferenceMethod, log: RunLog | None = None, *, resume: bool = False
) -> Policy:
    """Trains a policy and saves it in ``cfg.out / "model"``.

    Args:
        cfg: The configuration.
        method: What the stage adds to the loop.
        log: Where to log; None makes a log in ``cfg.out``.
        resume: Go on from the last checkpoint in ``cfg.out``, if there is one.
    """
    check_preference(cfg)
    with Session(cfg, log, method.name, resume=resume) as session:
        log = session.log
        loop = PreferenceLoop(cfg, method, log.note)
        state, policy = loop.state, loop.state.policy
        for _ in session.steps(state, cfg.steps):
            session.done(loop.step())
        result: dict[str, Any] = {"units": len(loop.train.replies.units), "last_loss": state.last["loss"]}
        if loop.held_out is not None:
            result |= loop.evaluate()
        shown = [(k.replace("_", " "), f"{v:.5g}" if isinstance(v, float) else str(v)) for k, v in result.items()]
        log.table(f"{method.name.upper()} on preferences", shown)
        session.save(policy)
        if session.own:
            plain = {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in result.items()}
            log.summary({method.name: plain})
    return policy
