"""Reward model on pairs or ranked lists: all pairs of a group, in one forward pass over its responses.

Bradley-Terry over K-wise rankings, Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1. A pair is a
ranking of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rlhf_kernels as rk
from trainer.base.statistics import Estimate, proportion
from trainer.data import reading as data
from trainer.data.cursor import Cursor
from trainer.data.encoding import Note, encode_pairs, encode_prompts, told_apart
from trainer.data.packing import Packed, Sample, pack, within_budget
from trainer.models.loading import load_policy
from trainer.models.policy import ScalarModel
from trainer.models.rendering import render_as
from trainer.models.router import say_without
from trainer.run.log import RunLog
from trainer.sampling.rollout import sample
from trainer.training.defaults import decided
from trainer.training.optimizer import Optimizer
from trainer.training.options import StageConfig
from trainer.training.precision import autocast
from trainer.training.progress import Progress
from trainer.training.seeds import generator
from trainer.training.session import Session
from trainer.training.setup import fitted, scalar_for


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Reward model on pairs, or on ranked lists {"prompt", "responses", "ranks"}."""

    center_coef: float = 0.0
    """Weight of the squared sum of scores, which keeps them near zero."""
    label_smoothing: float = 0.0
    """Share of comparisons that annotators get wrong."""
    calibration: int = 256
    """Responses to sample from --model, whose scores get mean 0 and deviation 1; 0 takes the training responses."""
    calibration_new_tokens: int = 128
    """Longest response of these."""
    eval_data: Path | None = None
    """Held-out pairs or ranked lists, for the table at the end."""


@dataclass(frozen=True)
class Ranked:
    """Responses to one prompt. Lower ranks are better; equal ranks are ties."""

    samples: list[Sample]
    ranks: list[float]


@dataclass(frozen=True)
class RankedBatch:
    """Whole groups, packed."""

    packed: Packed
    ranks: torch.Tensor  # [S]
    groups: torch.Tensor  # [S] int64, ids of groups
    count: int  # groups in which not everything is a tie


def loss(cfg: RewardConfig, model: ScalarModel, batch: RankedBatch, num_groups: int) -> rk.LossOutput:
    """Loss of one micro-batch under the number of groups of the whole step."""
    return rk.bradley_terry_loss(
        model.raw_scores(batch.packed), ranks=batch.ranks, groups=batch.groups, num_groups=num_groups,
        center_coef=cfg.center_coef, label_smoothing=cfg.label_smoothing,
    )  # fmt: skip


def micro_batches(groups: Sequence[Ranked], max_tokens: int, device: torch.device) -> list[RankedBatch]:
    """Packs of whole groups, at most ``max_tokens`` tokens each."""
    batches = []
    for part in within_budget([sum(len(s.tokens) for s in g.samples) for g in groups], max_tokens):
        chosen = [groups[i] for i in part]
        ids = [n for n, g in enumerate(chosen) for _ in g.samples]
        batches.append(
            RankedBatch(
                pack([s for g in chosen for s in g.samples], device),
                torch.tensor([r for g in chosen for r in g.ranks], dtype=torch.float32, device=device),
                torch.tensor(ids, device=device),
                sum(len(set(g.ranks)) > 1 for g in chosen),
            )
        )
    return batches


@torch.no_grad()
def score_all(model: ScalarModel, samples: Sequence[Sample], max_tokens: int, device: torch.device) -> torch.Tensor:
    """Raw scores, [n] float32 on the host."""
    parts = within_budget([len(s.tokens) for s in samples], max_tokens)
    return torch.cat([model.raw_scores(pack([samples[i] for i in part], device)).cpu() for part in parts])


def pair_agreement(
    model: ScalarModel, groups: Sequence[Ranked], max_tokens: int, device: torch.device
) -> tuple[int, int]:
    """Pairs of unequal rank that the model orders as given, and all pairs of unequal rank."""
    scores = score_all(model, [s for g in groups for s in g.samples], max_tokens, device).tolist()
    right = total = at = 0
    for g in groups:
        mine = scores[at : at + len(g.ranks)]
        at += len(g.ranks)
        for i, j in combinations(range(len(g.ranks)), 2):
            if g.ranks[i] != g.ranks[j]:
                total += 1
                right += (mine[i] > mine[j]) == (g.ranks[i] < g.ranks[j])
    return right, total


class Trained(NamedTuple):
    """A reward model and its accuracy on held-out pairs, where there were any."""

    model: ScalarModel
    accuracy: Estimate | None


@dataclass
class RewardState(Progress):
    """Everything that a step changes."""

    model: ScalarModel
    optimizer: Optimizer
    cursor: Cursor


def reward_model(
    cfg: RewardConfig, log: RunLog | None = None, *, name: str = "reward", resume: bool = False
) -> Trained:
    """Trains a reward model and saves it, with its mean and deviation, in ``cfg.out / "model"``.

    Args:
        cfg: The configuration.
        log: Where to log; None makes a log in ``cfg.out``.
        name: Of the stage in the log.
        resume: Go on from the last checkpoint in ``cfg.out``, if there is one.
    """
    with Session(cfg, log, name, resume=resume) as session:
        log, device, cfg = session.log, session.device, decided(cfg)
        records = data.read(cfg.data, "ranked", render=render_as(cfg), note=log.note)
        model = scalar_for(cfg, cfg.model, [r["prompt"] + " " + x for r in records for x in r["responses"]], device)
        cfg = fitted(cfg, model, log.note)
        say_without(model, log.note)
        groups = groups_of(cfg, model.tokenizer, records, log.note)
        state = RewardState(
            model, Optimizer(cfg, model, cfg.steps, name="reward model"), Cursor(len(groups), cfg.batch_size, cfg.seed)
        )
        for _ in session.steps(state, cfg.steps):
            batches = micro_batches([groups[i] for i in state.cursor.next()], cfg.max_tokens, device)
            counts = [b.count for b in batches]

            def step_loss(batch: RankedBatch, num_groups: int = sum(counts)) -> rk.LossOutput:
                with autocast(cfg, device):
                    return loss(cfg, model, batch, num_groups)

            session.done(state.optimizer.step(batches, step_loss, counts))
        model.set_statistics(_calibrating_scores(cfg, model, [r["prompt"] for r in records], groups, device))
        result: dict[str, Any] = {"ranked_prompts": len(groups), "last_accuracy": round(state.last["accuracy"], 3)}
        accuracy = None
        if cfg.eval_data is not None:
            held = data.read(cfg.eval_data, "ranked", render=render_as(cfg), note=log.note)
            held_out = groups_of(cfg, model.tokenizer, held, log.note)
            accuracy = proportion(*pair_agreement(model, held_out, cfg.max_tokens, device))
            result["held_out_accuracy"] = accuracy
        log.table("Reward model", [(k.replace("_", " "), str(v)) for k, v in result.items()])
        session.save(model)
        if session.own:
            log.summary({name: result | ({"held_out_accuracy": accuracy.to_dict()} if accuracy else {})})
    return Trained(model, accuracy)


def groups_of(
    cfg: RewardConfig, tokenizer: Any, records: Sequence[dict[str, Any]], note: Note | None = None
) -> list[Ranked]:
    """Ranked records as token sequences."""
    prompts = [r["prompt"] for r in records for _ in r["responses"]]
    responses = [x for r in records for x in r["responses"]]
    sizes = [len(r["responses"]) for r in records]
    samples = iter(encode_pairs(tokenizer, prompts, responses, cfg.max_length, note=note, groups=sizes))
    groups = [Ranked(list(islice(samples, len(r["responses"]))), list(r["ranks"])) for r in records]
    return told_apart(groups, [(g.samples, g.ranks) for g in groups], cfg.max_length, note)


def _calibrating_scores(
    cfg: RewardConfig, model: ScalarModel, prompts: Sequence[str], groups: Sequence[Ranked], device: torch.device
) -> torch.Tensor:
    """Raw scores whose mean and deviation will be 0 and 1: those of the policy that PPO will start from."""
    if cfg.calibration == 0 or cfg.model == "tiny":
        samples = [s for g in groups for s in g.samples]
    else:
        policy = load_policy(cfg.model).to(device)
        room = max(cfg.max_length - cfg.calibration_new_tokens, cfg.max_length // 2, 1)
        tokens = encode_prompts(policy.tokenizer, prompts[: cfg.calibration], room)
        samples = sample(
            policy,
            tokens,
            max_new_tokens=min(cfg.calibration_new_tokens, max(cfg.max_length - room, 1)),
            generator=generator(cfg, 11, device),
        ).samples
    return score_all(model, samples, cfg.max_tokens, device)
