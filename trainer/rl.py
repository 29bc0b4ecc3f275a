"""The loop of every stage that learns from its own responses: sample, score, estimate advantages, update.

A stage brings a ``Method``: where advantages come from, and what an update minimises. Between any two calls of
``rollout``, ``minibatch`` and ``finish`` everything that they change lies in one ``RLState``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

import rlhf_kernels as rk
from trainer.aspects import Rewards, sources_of, truncation_score
from trainer.chat import render_as
from trainer.cursor import Cursor
from trainer.defaults import decided
from trainer.experience import Experience, collect
from trainer.kl import KLController
from trainer.log import RunLog
from trainer.models import Policy, ScalarModel, frozen
from trainer.monitor import Monitor
from trainer.packing import Packed
from trainer.ptx import Ptx
from trainer.reward_fields import read_prompts
from trainer.rl_config import RLConfig, check
from trainer.rl_method import Method, Totals
from trainer.rl_metrics import NO_DIFFERENCE, named, show
from trainer.router import say_without
from trainer.session import Session
from trainer.shared_value import SharedValue
from trainer.signals import signals
from trainer.stage import Optimizer, autocast, fitted, generator, policy_for, prepare
from trainer.state import Progress
from trainer.text import encode_prompts
from trainer.watch import Watch


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
    monitor: Monitor
    buffer: Experience | None = None  # the rollout under way
    epoch: int = 0  # passes over it begun
    order: list[int] = field(default_factory=list)  # sequences that the present pass has yet to visit
    behind: list[int] = field(default_factory=list)  # those that the value model has yet to learn from
    metrics: dict[str, float] = field(default_factory=dict)  # of the rollout under way
    history: list[dict[str, float]] = field(default_factory=list)  # of the optimizer steps taken on it


LOOKED = 512  # tokens of a rollout on which the update is looked at when it is over


class Loop:
    """One run: what stays as it is, and ``state``, which does not.

    Args:
        cfg: The configuration.
        method: What the stage adds.
        note: Receives messages about the data, and about the first rollout without a difference.
    """

    def __init__(self, cfg: RLConfig, method: Method, note: Callable[[str], None]) -> None:
        cfg, self.note, self.told = decided(cfg), note, False
        check(cfg)
        cfg = replace(cfg, truncation_score=truncation_score(cfg))
        self.cfg, self.method, self.device = cfg, method, prepare(cfg)
        self.records = read_prompts(cfg.data, sources_of(cfg), render=render_as(cfg), note=note)
        self.texts = [r["prompt"] for r in self.records]
        policy = policy_for(cfg, self.texts, self.device)
        self.cfg = cfg = fitted(cfg, policy, note)
        say_without(policy, note)
        self.reference = frozen(policy)
        self.watch = Watch(cfg, policy.tokenizer, self.device)
        monitor = self.watch.monitor()
        self.rewards = Rewards(cfg, policy.tokenizer, self.device)
        self.reward = self.watch.shown(self.rewards, monitor)
        value = method.value_model(policy, self.texts)
        if isinstance(value, ScalarModel):
            self.cfg = cfg = fitted(cfg, value, note)
        self.prompts = encode_prompts(policy.tokenizer, self.texts, cfg.max_length - cfg.max_new_tokens, note)
        self.ptx = Ptx(cfg, policy, note) if cfg.ptx_coef else None
        updates = cfg.steps * cfg.epochs * cfg.minibatches
        optimizers = {"policy": Optimizer(cfg, method.trained(policy, value), updates, name="policy")}
        if isinstance(value, ScalarModel):
            optimizers["value"] = Optimizer(cfg, value, updates, getattr(cfg, "value_lr", cfg.lr), "value model")
        self.state = RLState(
            policy, value, optimizers,
            control=KLController(cfg.kl_coef, cfg.kl_target_per_seq, cfg.kl_horizon),
            sampling=generator(cfg, 1, self.device),
            shuffling=generator(cfg, 2),
            prompts=Cursor(len(self.prompts), cfg.batch_size, cfg.seed),
            ptx=self.ptx and Cursor(len(self.ptx.samples), cfg.ptx_batch_size, cfg.seed + 1),
            monitor=monitor,
        )  # fmt: skip

    def rollout(self) -> None:
        """Fills the buffer."""
        s, began = self.state, time.perf_counter()
        each = [i for i in s.prompts.next() for _ in range(self.method.per_prompt)]
        with signals.interruptible(), autocast(self.cfg, self.device):
            batch, metrics = collect(
                self.cfg, s.policy, self.reference, s.value, self.reward,
                [self.prompts[i] for i in each], [self.records[i] for i in each], s.sampling, self.method.nothing_in,
            )  # fmt: skip
        s.buffer, more = (None, NO_DIFFERENCE) if batch is None else self.method.advantages(batch, s.control.coef)
        if batch is None and not self.told:
            self.note("All answers to the same prompt scored alike, so this rollout takes no step (told only once).")
            self.told = True
        s.metrics |= (
            metrics | self.rewards.logged | more | {"timing/rollout": time.perf_counter() - began, "timing/update": 0.0}
        )

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
        s, cfg = self.state, self.cfg
        parts, weights, totals = self._parts(buffer, chosen)
        old = self.ptx.packs(s.ptx.next(), self.device) if self.ptx and s.ptx else []
        old_tokens = sum(int(p.mask.sum()) for p in old)
        kept: list[float] = []

        def loss(part: Experience | Packed) -> rk.LossOutput:
            with autocast(cfg, self.device):
                if isinstance(part, Experience):
                    return self.method.policy_loss(s.policy, part, totals, s.control.coef)
                assert self.ptx is not None
                out = self.ptx.loss(s.policy, part, old_tokens)
            kept.append(float(out.loss.detach()))
            return out

        row = s.optimizers["policy"].step([*parts, *old], loss, [*weights, *(0 for _ in old)])
        row["loss"] -= row.pop("added", 0.0)
        return row | ({"loss": row["loss"] - sum(kept), "ptx": sum(kept) / cfg.ptx_coef} if old else {})

    def _value_step(self, buffer: Experience, chosen: list[int]) -> dict[str, float]:
        value = self.state.value
        assert isinstance(value, ScalarModel)
        parts, weights, totals = self._parts(buffer, chosen)

        def loss(part: Experience) -> rk.LossOutput:
            with autocast(self.cfg, self.device):
                return self.method.value_loss(value, part, totals)

        return self.state.optimizers["value"].step(parts, loss, weights)

    def _parts(self, buffer: Experience, chosen: list[int]) -> tuple[list[Experience], list[int], Totals]:
        """Micro-batches of the chosen sequences, their tokens, and the denominators of them all."""
        parts = buffer.parts(chosen, self.cfg.max_tokens)
        weights = [int(p.packed.mask.sum()) for p in parts]
        return parts, weights, Totals(sum(weights), len(chosen))

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


def train(
    cfg: RLConfig,
    method: Method,
    log: RunLog | None = None,
    *,
    name: str,
    evaluate: Callable[[Policy], dict[str, float]] | None = None,
    resume: bool = False,
) -> Policy:
    """Trains a policy and saves it, with its value model where there is one, in ``cfg.out``.

    Args:
        cfg: The configuration.
        method: What the stage adds to the loop.
        log: Where to log; None makes a log in ``cfg.out``.
        name: Of the stage in the log.
        evaluate: Called before the first step, every ``cfg.eval_every`` steps and at the end; its results are logged.
        resume: Go on from the last checkpoint in ``cfg.out``, if there is one.
    """
    check(decided(cfg))
    with Session(cfg, log, name, resume=resume) as session:
        log, cfg = session.log, decided(cfg)
        loop = Loop(cfg, method, log.note)
        state, policy = loop.state, loop.state.policy

        def evaluated() -> dict[str, float]:
            with signals.interruptible():
                return loop.watch.evaluate(policy) | (evaluate(policy) if evaluate is not None else {})

        for _ in session.steps(state, cfg.steps):
            if state.part == 0:
                state.metrics = evaluated() if state.step == 0 else {}
                loop.rollout()
                session.safe_point()
            while loop.minibatch():
                session.safe_point()
            metrics, step = loop.finish(), state.step + 1
            if step % cfg.eval_every == 0 or step == cfg.steps:
                metrics |= evaluated()
            metrics |= loop.watch.update(step, metrics, state.monitor, state.control, log, name)
            state.over = loop.watch.stopped_by is not None
            session.done(metrics)
        session.save(policy)
        if state.value is not None:
            session.save(state.value, "value")
        if session.own:
            show(loop.cfg, log, {"before": loop.reference, "after": policy}, loop.texts[:4])
            log.summary({name: state.last})
    return policy
