"""The loop of reinforcement learning: its first step, its denominators, and what it says of bad rollouts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import runs
from tests.support.rollouts import experience, gradient, world
from tests.support.runs import Stopper
from tests.support.small import LETTERS, lines, ragged, small_policy, small_scalar, write
from trainer.data.packing import Sample
from trainer.run.log import RunLog
from trainer.sampling.rollout import Rollout
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.method import StepTotals
from trainer.training.defaults import decided


def test_pitfall_24_responses_without_an_end_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_policy(scale=1.0).save(tmp_path / "model")
    source = random.Random(0)
    prompts = write(tmp_path / "p.jsonl", ({"prompt": " ".join(source.sample(LETTERS, 2))} for _ in range(8)))
    for tokens, loud in ((1, True), (400, False)):
        cfg = ppo.PPOConfig(
            model=str(tmp_path), data=prompts, out=tmp_path / f"out{tokens}", reward="tests.support.small:share_of_a",
            steps=1, batch_size=8, max_new_tokens=tokens, quiet=True,
        )  # fmt: skip
        rl_stage.ppo(cfg, RunLog(cfg.out, quiet=True))
        (row,) = lines(cfg.out / "metrics.jsonl")
        assert (row["response/truncated"] >= 0.95) is loud
        said = capsys.readouterr().err
        assert ("ALARM in ppo: truncation, since update 1" in said) is loud
        assert ("Raise max_new_tokens" in said) is loud


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_pitfall_15_options_of_the_loop_survive_a_stop_at_every_safe_point(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared backbone, importance weights, transformers' sampler, an ensemble: the same bits as without a stop."""
    path, stopper = runs.world(tmp_path), Stopper(monkeypatch)
    reward = "tests.support.runs:early_letters"
    more: dict[str, Any] = {
        "reward": (f"{reward},{reward}", f"again={reward}@0.5"), "steps": 1, "importance_cap": 1.5,
        "sampler": "generate", "kl_target_per_seq": 0.01,
    }  # fmt: skip
    more |= {"value_model": "shared"} if stage == "ppo" else {"baseline": "batch", "scale": "none", "kl_in": "reward"}
    whole, pieces = (runs.config(stage, path, tmp_path / out, **more) for out in ("whole", "pieces"))
    runs.train(whole)
    assert runs.one_step_at_a_time(pieces, stopper) == (1 + 4 + 1) + 1
    assert runs.finished(whole.out) == runs.finished(pieces.out)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_pitfall_03_the_first_ratio_is_one_and_the_kl_starts_at_zero(stage: str, tmp_path: Path) -> None:
    policy = small_policy(scale=1.0)
    policy.model.config.attention_dropout = 0.1
    common = world(tmp_path, policy) | {"epochs": 1, "minibatches": 1, "temperature": 0.7}
    if stage == "ppo":
        rl_stage.ppo(ppo.PPOConfig(**common))
    else:
        rl_stage.grpo(grpo.GRPOConfig(**common, num_generations=3))
    first, second = lines(tmp_path / "out" / "metrics.jsonl")
    for step in (first, second):  # one step per rollout: every ratio is a first one
        assert step["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert step["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
        assert step["rollout/sampler_delta"] < 1e-4
        assert 0 < step["policy/entropy_avg"] < 3.1
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0


REDUCTIONS: dict[str, Any] = {
    "token": {"reduction": "token_mean"},
    "sequence": {"reduction": "sequence_mean"},
    "sum": {"reduction": "sequence_sum"},
    "constant": {"reduction": "constant"},
    "gspo": {"reduction": "sequence_mean", "ratio": "sequence"},
}


@pytest.mark.parametrize("max_tokens", [200, 90, 45, 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pitfall_05_micro_batches_do_not_change_gradients(reduction: str, max_tokens: int, tmp_path: Path) -> None:
    """Policy and value, with responses of one and three tokens beside long ones, and the KL in the loss."""
    samples = [Sample([2, 3, 4], 2), Sample([2, 3, 4, 5], 1), *ragged(6)]
    whole, policy, scalar = experience(samples), small_policy(), small_scalar()
    method = grpo.GRPO(decided(grpo.GRPOConfig(data=tmp_path, reward="", entropy_coef=0.1, **REDUCTIONS[reduction])))
    critic = ppo.PPO(ppo.PPOConfig(data=tmp_path, reward=""))
    totals = StepTotals(int(whole.packed.mask.sum()), 8)

    def gradients(budget: int) -> tuple[int, list[torch.Tensor]]:
        parts = whole.parts(range(8), budget)
        for part in parts:
            method.policy_loss(policy, part, totals, 0.3).loss.backward()
            critic.value_loss(scalar, part, totals).loss.backward()
        return len(parts), [gradient(policy), gradient(scalar)]

    count, found = gradients(max_tokens)
    assert count == {200: 1, 90: 2, 45: 4, 1: 8}[max_tokens]
    for mine, wanted in zip(found, gradients(10_000)[1], strict=True):
        assert wanted.norm() > 1e-4
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm()


def test_pitfall_06_nothing_to_learn_from_is_finite(tmp_path: Path) -> None:
    """A response of no token, one of a single token, and a micro-batch without any target."""
    policy, scalar = small_policy(), small_scalar()
    whole = experience([Sample([2, 3], 2), Sample([4, 5, 6], 3), Sample([2, 3, 4], 2), Sample([5], 1)])
    assert int(whole.packed.mask.sum()) == 1
    critic = ppo.PPO(ppo.PPOConfig(data=tmp_path, reward="", truncation="bootstrap"))
    estimated = [critic.advantages(whole, 0.1)[0]]
    for baseline, scale in (("mean", "group_std"), ("leave_one_out", "none"), ("batch", "batch_std")):
        cfg = grpo.GRPOConfig(data=tmp_path, reward="", num_generations=2, baseline=baseline, scale=scale)  # type: ignore[arg-type]
        estimated.append(grpo.GRPO(cfg).advantages(whole, 0.1)[0])
    for found in estimated:
        assert found is not None
        assert found.advantages is not None
        assert bool(found.advantages.isfinite().all())
        assert not found.advantages[~found.packed.mask].any()
    for reduction in REDUCTIONS.values():
        method = grpo.GRPO(decided(grpo.GRPOConfig(data=tmp_path, reward="", **reduction)))
        for totals in (StepTotals(1, 4), StepTotals(0, 0)):
            for empty in (whole.select([0]), whole.select([1, 3])):
                out = method.policy_loss(policy, empty, totals, 0.1)
                out.loss.backward()
                critic.value_loss(scalar, empty, totals).loss.backward()
                assert out.loss == 0
                assert not gradient(policy).any()
                assert not gradient(scalar).any()


@pytest.mark.parametrize(("truncation", "cut", "told"), [
    ("bootstrap", 19, "so that no end is ever rewarded"), ("bootstrap", 18, ""),
    ("penalise", 10, "the reward is being ignored"), ("penalise", 9, ""),
])  # fmt: skip
def test_pitfall_24_responses_that_never_end_are_called_out_at_the_first_update(
    truncation: str, cut: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On the screen of a run that is quiet otherwise."""

    def endless(policy: Any, prompts: list[list[int]], **_: Any) -> Rollout:
        samples = [Sample([*p, 5], len(p)) for p in prompts]
        return Rollout(samples, [i < cut for i in range(20)], [[0.0]] * 20)

    monkeypatch.setattr("trainer.stages.rl.experience.sample", endless)
    options: dict[str, Any] = world(tmp_path) | {"batch_size": 20, "steps": 1, "truncation": truncation}
    rl_stage.ppo(ppo.PPOConfig(**options))
    said = capsys.readouterr().err
    assert said.count(f"{5 * cut}% of the responses were cut off") == (1 if told else 0)
    assert told in said
    assert ("Raise max_new_tokens" in said) == bool(told)


def test_minibatches_of_unequal_size_cover_a_rollout_once(tmp_path: Path) -> None:
    """Also where there are more of them than responses."""
    for prompts, minibatches, sizes in ((5, 2, [3, 2]), (1, 4, [1])):
        (place := tmp_path / str(prompts)).mkdir()
        options: dict[str, Any] = world(place) | {"batch_size": prompts, "minibatches": minibatches, "epochs": 1}
        cfg = grpo.GRPOConfig(**options, num_generations=1, baseline="batch", scale="none", entropy_coef=0.1)
        loop = rl_stage.begin(cfg, grpo.GRPO(cfg), print).loop
        loop.rollout()
        left, seen = prompts, []
        while len(seen) < 9 and loop.minibatch():
            seen.append(left - len(loop.state.order))
            left = len(loop.state.order)
        assert seen == sizes
