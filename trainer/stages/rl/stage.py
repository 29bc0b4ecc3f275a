"""The stages ``ppo`` and ``grpo``: models, data, rewards and monitors around the loop, and a run from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from trainer.data.cursor import Cursor
from trainer.data.encoding import encode_prompts
from trainer.models.policy import Policy, ScalarModel, frozen
from trainer.models.rendering import render_as
from trainer.models.router import say_without
from trainer.monitors.history import thresholds_from
from trainer.monitors.monitor import Monitor
from trainer.rewards import truncation
from trainer.rewards.aspects import Rewards
from trainer.rewards.fields import read_prompts
from trainer.rewards.names import only_models, sources_of
from trainer.run.log import RunLog
from trainer.run.stops import stop_signals
from trainer.stages.rl.grpo import GRPO, GRPOConfig
from trainer.stages.rl.kl_controller import KLController
from trainer.stages.rl.loop import Given, RLLoop, RLState
from trainer.stages.rl.method import RLMethod
from trainer.stages.rl.options import RLConfig, check_rl
from trainer.stages.rl.ppo import PPO, PPOConfig
from trainer.stages.rl.ptx import PtxTexts
from trainer.stages.rl.samples import show_samples
from trainer.stages.rl.value import trained_together, value_model_for
from trainer.stages.rl.watch import Watch
from trainer.training.defaults import decided
from trainer.training.optimizer import Optimizer
from trainer.training.seeds import generator
from trainer.training.session import Session
from trainer.training.setup import fitted, policy_for, prepare

Evaluation = Callable[[Policy], dict[str, float]]


class Begun(NamedTuple):
    """A run that is ready for its first rollout."""

    loop: RLLoop
    watch: Watch
    monitor: Monitor
    texts: list[str]
    """The prompts."""


def ppo(
    cfg: PPOConfig,
    log: RunLog | None = None,
    *,
    name: str = "ppo",
    evaluate: Evaluation | None = None,
    resume: bool = False,
) -> Policy:
    """Trains a policy and a value model with PPO; see ``train_rl``."""
    return train_rl(cfg, PPO(decided(cfg)), log, name=name, evaluate=evaluate, resume=resume)


def grpo(
    cfg: GRPOConfig,
    log: RunLog | None = None,
    *,
    name: str = "grpo",
    evaluate: Evaluation | None = None,
    resume: bool = False,
) -> Policy:
    """Trains a policy with GRPO or one of its relatives; see ``train_rl``."""
    return train_rl(cfg, GRPO(decided(cfg)), log, name=name, evaluate=evaluate, resume=resume)


def check_run(cfg: RLConfig) -> None:
    """Refuses options that would fail, or mean nothing, only after work has begun.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    check_rl(cfg)
    thresholds_from(cfg.thresholds)


def begin(cfg: RLConfig, method: RLMethod, note: Callable[[str], None]) -> Begun:
    """Reads the data, loads the models, and makes a loop of them.

    Args:
        cfg: The configuration.
        method: The algorithm.
        note: Receives messages about the data, and about the first rollout without a difference.
    """
    cfg = decided(cfg)
    check_run(cfg)
    cfg = replace(cfg, truncation_score=truncation.fixed_score(cfg, only_models=only_models(cfg.reward)))
    device = prepare(cfg)
    records = read_prompts(cfg.data, sources_of(cfg), render=render_as(cfg), note=note)
    texts = [r["prompt"] for r in records]
    policy = policy_for(cfg, texts, device)
    cfg = fitted(cfg, policy, note)
    say_without(policy, note)
    reference = frozen(policy)
    watch = Watch(cfg, policy.tokenizer, device)
    monitor = watch.monitor()
    rewards = Rewards(cfg, policy.tokenizer, device)
    value = value_model_for(cfg, policy, texts) if isinstance(cfg, PPOConfig) else None
    if isinstance(value, ScalarModel):
        cfg = fitted(cfg, value, note)
    prompts = encode_prompts(policy.tokenizer, texts, cfg.max_length - cfg.max_new_tokens, note)
    ptx = PtxTexts(cfg, policy, note) if cfg.ptx_coef else None
    updates = cfg.steps * cfg.epochs * cfg.minibatches
    optimizers = {"policy": Optimizer(cfg, trained_together(policy, value), updates, name="policy")}
    if isinstance(value, ScalarModel):
        optimizers["value"] = Optimizer(cfg, value, updates, getattr(cfg, "value_lr", cfg.lr), "value model")
    state = RLState(
        policy, value, optimizers,
        control=KLController(cfg.kl_coef, cfg.kl_target_per_seq, cfg.kl_horizon),
        sampling=generator(cfg, 1, device),
        shuffling=generator(cfg, 2),
        prompts=Cursor(len(prompts), cfg.batch_size, cfg.seed),
        ptx=ptx and Cursor(len(ptx.samples), cfg.ptx_batch_size, cfg.seed + 1),
        monitor=monitor,
    )  # fmt: skip
    given = Given(reference, rewards, prompts, records, ptx, lambda *found: watch.see(monitor, *found), note)
    return Begun(RLLoop(cfg, method, state, given), watch, monitor, texts)


def train_rl(
    cfg: RLConfig,
    method: RLMethod,
    log: RunLog | None = None,
    *,
    name: str,
    evaluate: Evaluation | None = None,
    resume: bool = False,
) -> Policy:
    """Trains a policy and saves it, with its value model where there is one, in ``cfg.out``.

    Args:
        cfg: The configuration.
        method: The algorithm.
        log: Where to log; None makes a log in ``cfg.out``.
        name: Of the stage in the log.
        evaluate: Called before the first step, every ``cfg.eval_every`` steps and at the end; its results are logged.
        resume: Go on from the last checkpoint in ``cfg.out``, if there is one.
    """
    check_run(decided(cfg))
    with Session(cfg, log, name, resume=resume) as session:
        log, cfg = session.log, decided(cfg)
        loop, watch, monitor, texts = begin(cfg, method, log.note)
        state, policy = loop.state, loop.state.policy

        def evaluated() -> dict[str, float]:
            with stop_signals.interruptible():
                return watch.evaluate(policy) | (evaluate(policy) if evaluate is not None else {})

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
            metrics |= watch.update(step, metrics, monitor, state.control, log, name)
            state.over = watch.stopped_by is not None
            session.done(metrics)
        session.save(policy)
        if state.value is not None:
            session.save(state.value, "value")
        if session.own:
            show_samples(loop.cfg, log, {"before": loop.given.reference, "after": policy}, texts[:4])
            log.summary({name: state.last})
    return policy
