"""The stages: denominators, PPO's first ratio, rewards at the right token, and that each of them learns."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rlhf_kernels as rk
from tests.trainer_worlds import LETTERS, lines, ragged, small_policy, small_scalar, write
from trainer import ppo, reward, sft
from trainer.experience import Experience, collect
from trainer.kl import KLController
from trainer.models import load_policy, load_scalar
from trainer.packing import Sample, pack
from trainer.rollout import Rollout
from trainer.stage import Optimizer

HERE = "tests.trainer_worlds"


def demonstrations(path: Path) -> Path:
    source = random.Random(0)
    words = [source.sample(LETTERS, 4) for _ in range(10)]
    return write(path, ({"prompt": " ".join(w[:2]), "response": " ".join(w[2:])} for w in words))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    small_policy(scale=1.0).save(path / "model")
    return str(path)


def gradient(model: nn.Module) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("max_tokens", [400, 120, 60, 1])
def test_micro_batches_do_not_change_gradients(max_tokens: int, tmp_path: Path) -> None:
    """Pitfall 5: every denominator is that of the whole step. Sequences of 3 and of 40 tokens among them."""
    policy, scalar, samples = small_policy(), small_scalar(), ragged(8)
    cfg = sft.SFTConfig(data=tmp_path)
    groups = [
        reward.Ranked(samples[:3], [0, 1, 2]),
        reward.Ranked(samples[3:5], [1, 0]),
        reward.Ranked(samples[5:], [0, 1, 1]),
    ]
    rewarding = reward.RewardConfig(data=tmp_path, center_coef=0.1)
    rl = ppo.PPOConfig(data=tmp_path, reward="", max_tokens=max_tokens, entropy_coef=0.1)
    whole = experience(samples)

    def gradients(budget: int) -> list[torch.Tensor]:
        batches = sft.micro_batches(samples, budget, "cpu")
        tokens = sum(int(b.mask.sum()) for b in batches)
        for batch in batches:
            sft.loss(cfg, policy, batch, tokens).loss.backward()
        found = [gradient(policy)]
        ranked = reward.micro_batches(groups, budget, torch.device("cpu"))
        for batch in ranked:
            reward.loss(rewarding, scalar, batch, sum(b.count for b in ranked)).loss.backward()
        found.append(gradient(scalar))
        for part in ppo.parts_of(whole, list(range(8)), budget):
            ppo.policy_loss(rl, policy, part, tokens).loss.backward()
            ppo.value_loss(rl, scalar, part, tokens).loss.backward()
        return [*found, gradient(policy), gradient(scalar)]

    for mine, wanted in zip(gradients(max_tokens), gradients(10_000), strict=True):
        assert wanted.norm() > 1e-3
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm()


def experience(samples: list[Sample]) -> Experience:
    packed, source = pack(samples), torch.Generator().manual_seed(1)
    n = len(packed.input_ids)
    old_logp, values, advantages, returns = (torch.randn(n, generator=source) for _ in range(4))
    return Experience(packed, old_logp - 3, values, advantages, returns, torch.zeros(len(samples)))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_stages_report_the_same_first_step_for_any_budget(stage: str, base: str, tmp_path: Path) -> None:
    """Pitfall 5 through the stages themselves: loss and gradient norm of step one."""
    seen = []
    for budget in (10_000, 12):
        out = tmp_path / str(budget)
        common: dict[str, Any] = {
            "model": base,
            "out": out,
            "steps": 1,
            "batch_size": 10,
            "quiet": True,
            "max_tokens": budget,
        }
        if stage == "sft":
            sft.train(sft.SFTConfig(data=demonstrations(tmp_path / "d.jsonl"), **common))
        elif stage == "reward":
            reward.train(reward.RewardConfig(data=rankings(tmp_path / "r.jsonl"), calibration=0, **common))
        else:
            cfg = ppo.PPOConfig(
                data=demonstrations(tmp_path / "d.jsonl"),
                reward=f"{HERE}:share_of_a",
                epochs=1,
                minibatches=1,
                **common,
            )
            ppo.train(dataclasses.replace(cfg, max_new_tokens=8))
        seen.append(lines(out / "metrics.jsonl")[0])
    timing = ("timing/rollout", "timing/update", "eps", "rollout/sampler_delta")
    for name in seen[0].keys() - {"stage", *timing}:
        assert seen[0][name] == pytest.approx(seen[1][name], rel=2e-4, abs=2e-6), name


def test_first_ratio_is_one_and_kl_starts_at_zero(tmp_path: Path) -> None:
    """Pitfall 3, with dropout in the model's configuration and a temperature."""
    policy = small_policy(scale=1.0)
    policy.model.config.attention_dropout = 0.1
    policy.save(tmp_path / "model")
    cfg = ppo.PPOConfig(
        model=str(tmp_path), data=demonstrations(tmp_path / "d.jsonl"), reward=f"{HERE}:share_of_a",
        out=tmp_path / "out", steps=2, batch_size=10, max_new_tokens=8, epochs=1, minibatches=1, temperature=0.7,
        quiet=True,
    )  # fmt: skip
    ppo.train(cfg)
    first, second = lines(tmp_path / "out" / "metrics.jsonl")
    for step in (first, second):  # one step per rollout: every ratio is a first one
        assert step["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert step["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
        assert step["rollout/sampler_delta"] < 1e-4
        assert 0 < step["policy/entropy_avg"] < 3.1
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0


def collected(
    tmp_path: Path, beta: float = 0.0, **options: Any
) -> tuple[Experience | None, dict[str, float], torch.Tensor]:
    cfg = ppo.PPOConfig(data=tmp_path, reward="", lam=1.0, **options)
    policy, value = small_policy(), small_scalar()
    prompts = [[2, 3, 4], [5], [6, 7]] * 4
    scores = torch.linspace(1, 2, 12)
    found, metrics = collect(
        cfg, policy, small_policy(seed=5), value, lambda rollout, records: scores, beta, prompts, [{}] * 12,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    return found, metrics, scores


def test_the_score_stands_on_the_last_response_token(tmp_path: Path) -> None:
    """Pitfall 7: with gamma 1/2 and no KL the return falls by half per token before the last one."""
    found, _, scores = collected(tmp_path, gamma=0.5, max_new_tokens=200)
    assert found is not None
    for i in range(12):
        part, rows = found.packed.select([i])
        returns = found.returns[rows][part.mask]
        assert int(part.targets[part.mask][-1]) == 1  # the last response token is the end of the sequence
        wanted = scores[i] * 0.5 ** torch.arange(len(returns) - 1, -1, -1)
        torch.testing.assert_close(returns, wanted)
        assert not found.returns[rows][~part.mask].any()


def test_rewards_fall_by_the_kl_and_advantages_are_white(tmp_path: Path) -> None:
    """Ouyang et al., equation 2: the return of a whole response is its score less beta times its log-ratio."""
    found, metrics, scores = collected(tmp_path, beta=0.3, max_new_tokens=200, temperature=1.5)
    assert found is not None
    policy, reference, kls = small_policy(), small_policy(seed=5), []
    for i in range(12):
        part, rows = found.packed.select([i])
        with torch.no_grad():
            logp, ref_logp = (m.stats(part, 1.5).logp for m in (policy, reference))
        torch.testing.assert_close(found.old_logp[rows], logp)
        kls.append(float((logp - ref_logp).sum()))
        assert found.returns[rows][part.mask][0] == pytest.approx(float(scores[i]) - 0.3 * kls[-1], abs=1e-4)
    assert metrics["objective/kl"] == pytest.approx(sum(kls) / 12, rel=1e-4)
    white = found.advantages[found.packed.mask]
    assert white.mean() == pytest.approx(0, abs=1e-5)
    assert white.std(unbiased=False) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("truncation", ["penalise", "bootstrap", "mask"])
def test_truncated_and_ended_responses_differ_as_asked(truncation: str, tmp_path: Path) -> None:
    """Pitfall 8: the last return is the fixed score, or the score with the value of what would have followed."""
    found, metrics, scores = collected(tmp_path, max_new_tokens=12, truncation=truncation, truncation_score=-7.0)
    assert found is not None
    assert 0 < metrics["response/truncated"] < 1
    value = small_scalar()
    ended = [int(found.packed.input_ids[row]) == 1 for row in found.packed.last_rows]
    if truncation == "mask":
        assert all(ended)
        assert len(ended) == round(12 * (1 - metrics["response/truncated"]))
        return
    with torch.no_grad():
        follows = value.values(found.packed)[found.packed.last_rows]
    for i, stopped in enumerate(ended):
        part, rows = found.packed.select([i])
        cut = torch.tensor(-7.0) if truncation == "penalise" else scores[i] + follows[i]
        torch.testing.assert_close(found.returns[rows][part.mask][-1], scores[i] if stopped else cut)


def test_nothing_is_left_when_every_response_is_cut_and_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(policy: Any, prompts: list[list[int]], **_: Any) -> Rollout:
        return Rollout([Sample([*p, 5], len(p)) for p in prompts], [True] * len(prompts), [[0.0]] * len(prompts))

    monkeypatch.setattr("trainer.experience.sample", cut)
    found, metrics, _ = collected(tmp_path, truncation="mask")
    assert found is None
    assert metrics["response/truncated"] == 1


def test_kl_controller_follows_the_published_formula() -> None:
    """Pitfall 9; Ziegler et al. 2019: e = clip(KL / target - 1, -0.2, 0.2), beta *= 1 + e * n / horizon."""
    control, beta, source = KLController(0.15, 6.0, 10_000), 0.15, random.Random(0)
    for _ in range(50):
        kl = source.uniform(0, 15)
        control.update(kl, 512)
        beta *= 1 + max(-0.2, min(0.2, (kl - 6) / 6)) * 512 / 10_000
        assert control.coef == pytest.approx(beta, rel=1e-12)
    fixed = KLController(0.15)
    fixed.update(100.0, 512)
    assert fixed.coef == 0.15


def rankings(path: Path) -> Path:
    """More a is better."""
    source = random.Random(1)
    records = []
    for _ in range(10):
        counts = source.sample(range(5), 4)
        responses = [" ".join(["a"] * c + source.sample(LETTERS[1:], 5 - c)) for c in counts]
        records.append(
            {"prompt": " ".join(source.sample(LETTERS, 2)), "responses": responses, "ranks": [5 - c for c in counts]}
        )
    return write(path, records)


def test_sft_learns_ten_examples_by_heart(base: str, tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "d.jsonl")
    cfg = sft.SFTConfig(
        model=base, data=data, out=tmp_path / "out", steps=120, batch_size=10, lr=1e-2, eval_data=data, quiet=True
    )
    policy = sft.train(cfg)
    assert sft.held_out_loss(policy, sft.samples_of(cfg, policy, lines(data)), 1000) < 0.05
    again = load_policy(str(tmp_path / "out"))
    packed = sft.micro_batches(sft.samples_of(cfg, policy, lines(data)), 1000, "cpu")[0]
    with torch.no_grad():
        assert torch.equal(again.stats(packed).logp, policy.stats(packed).logp)


def test_reward_model_learns_ten_rankings_and_keeps_its_statistics(base: str, tmp_path: Path) -> None:
    data = rankings(tmp_path / "r.jsonl")
    cfg = reward.RewardConfig(
        model=base, data=data, out=tmp_path / "out", steps=60, batch_size=10, lr=3e-3, eval_data=data, quiet=True
    )
    model, accuracy = reward.train(cfg)
    assert accuracy is not None
    assert accuracy.value == 1.0
    again = load_scalar(str(tmp_path / "out"))
    groups = reward.groups_of(cfg, model.tokenizer, lines(data))
    packed = reward.micro_batches(groups, 10_000, torch.device("cpu"))[0].packed
    with torch.no_grad():
        assert torch.equal(again.scores(packed), model.scores(packed))
        assert not torch.allclose(model.scores(packed), model.raw_scores(packed))


def test_ppo_learns_a_function_of_the_response(base: str, tmp_path: Path) -> None:
    cfg = ppo.PPOConfig(
        model=base, data=demonstrations(tmp_path / "d.jsonl"), reward=f"{HERE}:share_of_a",
        out=tmp_path / "out", steps=30, batch_size=40, max_new_tokens=6, lr=3e-3, value_lr=3e-3, kl_coef=0.01,
        truncation="bootstrap", quiet=True,
    )  # fmt: skip
    ppo.train(cfg)
    scores = [step["objective/scores"] for step in lines(tmp_path / "out" / "metrics.jsonl")]
    assert sum(scores[-5:]) / 5 > 0.7 > 0.3 > scores[0]


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_third_time(tmp_path: Path) -> None:
    policy = small_policy()
    before = [p.clone() for p in policy.parameters()]
    optimizer = Optimizer(sft.SFTConfig(data=tmp_path), policy, 10)

    def bad(_: int) -> rk.LossOutput:
        return rk.LossOutput(policy.weight.sum() * float("nan"), {})

    for i in range(2):
        assert optimizer.step([0], bad, [1])["skipped"] == i + 1
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        optimizer.step([0], bad, [1])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
