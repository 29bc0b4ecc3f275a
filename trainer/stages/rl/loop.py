"""The loop of every algorithm that learns from its own responses: sample, score, estimate advantages, update.

An ``RLMethod`` says where advantages come from, and what an update minimises. Between any two calls of ``rollout``,
``minibatch`` and ``finish`` everything that they change lies in one ``RLState``. Models and data come ready from
``trainer.stages.rl.stage``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import rlhf_kernels as rk
from trainer.data.cursor import Cursor
from trainer.data.packing import Packed
from trainer.models.policy import Policy, ScalarModel
from trainer.run.stops import stop_signals
from trainer.stages.rl.experience import Collected, Experience, Scoring, collect
from trainer.stages.rl.kl_controller import KLController
from trainer.stages.rl.method import RLMethod, StepTotals
from trainer.stages.rl.metrics import NO_DIFFERENCE, named
from trainer.stages.rl.options import RLConfig
from trainer.stages.rl.shared_value import SharedValue
from trainer.training.gradients import Terms
from trainer.training.optimizer import Optimizer
from trainer.training.precision import autocast
from trainer.training.progress import Progress

LOOKED = 512  # tokens of a rollout on which the update is looked at when it is over


class Stateful(Protocol):
    """What can be saved as JSON, and put back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Texts(Protocol):
    """Texts that the policy should not forget (``trainer.stages.rl.ptx``)."""

    def packs(self, indices: Sequence[int], device: torch.device) -> list[Packed]: ...

    def loss(self, policy: Policy, packed: Packed, num_tokens: int) -> Terms: ...


@dataclass
class RLState(Progress):
    """Everything that the loop changes, and so everything that it needs in order to go on elsewhere."""

    policy: Policy
    value: ScalarModel | SharedValue | None
    optimizers: dict[str, Optimizer]  # "policy", and "value" where there is one
    control: KLController
    sampling: torch.Generator
    shuffling: torch.Generator
    prompts: Cursor
    ptx: Cursor | None
    monitor: Stateful
    buffer: Experience | None = None  # the rollout under way
    epoch: int = 0  # passes over it begun
    order: list[int] = field(default_factory=list)  # sequences that the present pass has yet to visit
    behind: list[int] = field(default_factory=list)  # those that the value model has yet to learn from
    metrics: dict[str, float] = field(default_factory=dict)  # of the rollout under way
    history: list[dict[str, float]] = field(default_factory=list)  # of the optimizer steps taken on it


@dataclass(frozen=True)
class Given:
    """What the loop is given, and never changes."""

    reference: Policy
    """What the KL is measured to."""
    rewards: Scoring
    prompts: Sequence[list[int]]
    """Token ids of each prompt."""
    records: Sequence[dict[str, Any]]
    """The record of each prompt, for the rewards."""
    ptx: Texts | None
    see: Callable[[Collected, Sequence[dict[str, Any]]], None]
    """Is shown every rollout with the records of its prompts."""
    note: Callable[[str], None]
    """Receives a message about the first rollout without a difference."""


class RLLoop:
    """One run.

    Args:
        cfg: The configuration, with every ``auto`` decided.
        method: The algorithm.
        state: What changes.
        given: What does not.
    """

    def __init__(self, cfg: RLConfig, method: RLMethod, state: RLState, given: Given) -> None:
        self.cfg, self.method, self.state, self.given = cfg, method, state, given
        self.device, self.told = state.policy.weight.device, False

    def rollout(self) -> None:
        """Fills the buffer."""
        s, given, began = self.state, self.given, time.perf_counter()
        each = [i for i in s.prompts.next() for _ in range(self.method.per_prompt)]
        records = [given.records[i] for i in each]
        with stop_signals.interruptible(), autocast(self.cfg, self.device):
            found = collect(
                self.cfg, s.policy, given.reference, s.value, given.rewards,
                [given.prompts[i] for i in each], records, s.sampling, self.method.nothing_in,
            )  # fmt: skip
            given.see(found, records)
        if found.experience is None:
            s.buffer, more = None, NO_DIFFERENCE
            self._say_once("All answers to the same prompt scored alike, so this rollout takes no step")
        else:
            s.buffer, more = self.method.advantages(found.experience, s.control.coef)
        s.metrics |= found.metrics | more | {"timing/rollout": time.perf_counter() - began, "timing/update": 0.0}

    def minibatch(self) -> bool:
        """Takes one optimizer step on the buffer, in turn of the policy and of the value model; false if none is left.

        Only one model changes per call, so that between any two calls a run can be stopped.
        """
        s, cfg, began = self.state, self.cfg, time.perf_counter()
        if s.buffer is None or (not s.behind and not s.order and s.epoch == cfg.epochs):
            return False
        if s.behind:
            s.history[-1] |= {"value/" + k: v for k, v in self._value_step(s.buffer, s.behind).items()}
            s.behind = []
        else:
            count = len(s.buffer.scores)
            if not s.order:
                s.order = torch.randperm(count, generator=s.shuffling).tolist()
                s.epoch += 1
            size = -(-count // cfg.minibatches)
            chosen, s.order = s.order[:size], s.order[size:]
            s.history.append(self._policy_step(s.buffer, chosen))
            s.behind = chosen if "value" in s.optimizers else []
        s.metrics["timing/update"] += time.perf_counter() - began
        return True

    def _policy_step(self, buffer: Experience, chosen: list[int]) -> dict[str, float]:
        s, cfg, ptx = self.state, self.cfg, self.given.ptx
        parts, weights, totals = self._parts(buffer, chosen)
        old = ptx.packs(s.ptx.next(), self.device) if ptx is not None and s.ptx is not None else []
        old_tokens = sum(int(p.mask.sum()) for p in old)
        shared = s.value if isinstance(s.value, SharedValue) else None

        def loss(part: Experience | Packed) -> Terms:
            with autocast(cfg, self.device):
                if isinstance(part, Experience):
                    return self.method.policy_loss(s.policy, part, totals, s.control.coef, shared)
                assert ptx is not None
                return ptx.loss(s.policy, part, old_tokens)

        return s.optimizers["policy"].step([*parts, *old], loss, [*weights, *(0 for _ in old)])

    def _value_step(self, buffer: Experience, chosen: list[int]) -> dict[str, float]:
        value = self.state.value
        assert isinstance(value, ScalarModel)
        parts, weights, totals = self._parts(buffer, chosen)

        def loss(part: Experience) -> rk.LossOutput:
            with autocast(self.cfg, self.device):
                return self.method.value_loss(value, part, totals)

        return self.state.optimizers["value"].step(parts, loss, weights)

    def _parts(self, buffer: Experience, chosen: list[int]) -> tuple[list[Experience], list[int], StepTotals]:
        """Micro-batches of the chosen sequences, their tokens, and the denominators of them all."""
        parts = buffer.parts(chosen, self.cfg.max_tokens)
        weights = [int(p.packed.mask.sum()) for p in parts]
        return parts, weights, StepTotals(sum(weights), len(chosen))

    @torch.no_grad()
    def _moved(self, buffer: Experience) -> float:
        """Nats per token from the policy that sampled to that of now, over the first responses of the rollout."""
        count, lengths = 1, buffer.packed.lengths
        while count < len(lengths) and sum(lengths[: count + 1]) <= LOOKED:
            count += 1
        part = buffer.select(range(count))
        with autocast(self.cfg, self.device):
            logp = self.state.policy.stats(part.packed, self.cfg.temperature).logp
        ratio = (logp - part.old_logp)[part.packed.mask].double().clamp(max=50)
        return float((ratio.exp() - 1 - ratio).mean())  # the estimator k3 of policy/approxkl_avg

    def finish(self) -> dict[str, float]:
        """Empties the buffer, moves the KL coefficient, and returns what to log."""
        s, cfg = self.state, self.cfg
        metrics = s.metrics | named(s.history)
        if s.buffer is not None:
            metrics["policy/kl_after"] = self._moved(s.buffer)
            s.control.update(metrics["objective/kl"], len(s.buffer.scores))
        s.buffer, s.epoch, s.order, s.metrics, s.history = None, 0, [], {}, []
        seconds = metrics["timing/rollout"] + metrics["timing/update"]
        responses = cfg.batch_size * self.method.per_prompt
        return metrics | {"eps": responses / seconds, "episode": float((s.step + 1) * responses)}

    def _say_once(self, text: str) -> None:
        if not self.told:
            self.given.note(f"{text} (told only once).")
            self.told = True
