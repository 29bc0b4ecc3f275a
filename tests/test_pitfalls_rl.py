"""What goes wrong in trainers that learn from their own responses, each named after its number in the design."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rl_worlds import experience, gradient, returns_of, world
from tests.trainer_worlds import lines, ragged, small_policy, small_scalar
from trainer import grpo, ppo
from trainer.experience import Experience, collect
from trainer.kl import KLController
from trainer.packing import Sample
from trainer.rl import Totals
from trainer.rollout import Rollout


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_pitfall_03_the_first_ratio_is_one_and_the_kl_starts_at_zero(stage: str, tmp_path: Path) -> None:
    policy = small_policy(scale=1.0)
    policy.model.config.attention_dropout = 0.1
    common = world(tmp_path, policy) | {"epochs": 1, "minibatches": 1, "temperature": 0.7}
    if stage == "ppo":
        ppo.train(ppo.PPOConfig(**common))
    else:
        grpo.train(grpo.GRPOConfig(**common, num_generations=3))
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
    method = grpo.GRPO(grpo.GRPOConfig(data=tmp_path, reward="", entropy_coef=0.1, **REDUCTIONS[reduction]))
    critic = ppo.PPO(ppo.PPOConfig(data=tmp_path, reward=""))
    totals = Totals(int(whole.packed.mask.sum()), 8)

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
        method = grpo.GRPO(grpo.GRPOConfig(data=tmp_path, reward="", **reduction))
        for totals in (Totals(1, 4), Totals(0, 0)):
            for empty in (whole.select([0]), whole.select([1, 3])):
                out = method.policy_loss(policy, empty, totals, 0.1)
                out.loss.backward()
                critic.value_loss(scalar, empty, totals).loss.backward()
                assert out.loss == 0
                assert not gradient(policy).any()
                assert not gradient(scalar).any()


def collected(
    tmp_path: Path, beta: float = 0.0, **options: Any
) -> tuple[Experience | None, dict[str, float], torch.Tensor]:
    cfg = ppo.PPOConfig(data=tmp_path, reward="", **{"lam": 1.0, **options})
    policy, value = small_policy(), small_scalar()
    prompts = [[2, 3, 4], [5], [6, 7]] * 4
    scores = torch.linspace(1, 2, 12)
    batch, metrics = collect(
        cfg, policy, small_policy(seed=5), value, lambda rollout, records: scores, prompts, [{}] * 12,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert batch is not None
    found, more = ppo.PPO(cfg).advantages(batch, beta)
    return found, metrics | more, scores


def test_pitfall_07_the_score_stands_on_the_last_response_token(tmp_path: Path) -> None:
    """With gamma 1/2 and no KL the return falls by half per token before the last one."""
    found, _, scores = collected(tmp_path, gamma=0.5, max_new_tokens=200)
    assert found is not None
    for i in range(12):
        part, returns = found.packed.select([i])[0], returns_of(found, i)
        assert int(part.targets[part.mask][-1]) == 1  # the last response token is the end of the sequence
        torch.testing.assert_close(returns, scores[i] * 0.5 ** torch.arange(len(returns) - 1, -1, -1))


def test_pitfall_08_advantages_are_those_of_the_double_sum(tmp_path: Path) -> None:
    """A_t = sum over k >= t of (gamma lam)^(k - t) delta_k, whitened over the whole rollout."""
    gamma, lam, beta = 0.9, 0.8, 0.2
    found, _, scores = collected(tmp_path, beta=beta, gamma=gamma, lam=lam, max_new_tokens=200)
    assert found is not None
    assert found.values is not None
    assert found.advantages is not None
    expected: list[float] = []
    for i in range(12):
        part = found.select([i])
        mask = part.packed.mask
        assert part.values is not None
        rewards = (-beta * (part.old_logp - part.ref_logp))[mask].double().tolist()
        rewards[-1] += float(scores[i])
        values = [*part.values[mask].double().tolist(), 0.0]
        delta = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
        mine = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]
        torch.testing.assert_close(returns_of(found, i), torch.tensor(mine) + part.values[mask], rtol=1e-4, atol=1e-5)
        expected += mine
    raw = torch.tensor(expected, dtype=torch.float64)
    white = (raw - raw.mean()) / raw.std(unbiased=False)
    torch.testing.assert_close(found.advantages[found.packed.mask].double(), white, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("truncation", ["penalise", "bootstrap", "mask"])
def test_pitfall_08_truncated_and_ended_responses_differ_as_asked(truncation: str, tmp_path: Path) -> None:
    """The last return is the fixed score, or the score with the value of what would have followed."""
    found, metrics, scores = collected(tmp_path, max_new_tokens=12, truncation=truncation, truncation_score=-7.0)
    assert found is not None
    assert 0 < metrics["response/truncated"] < 1
    ended = [int(found.packed.input_ids[row]) == 1 for row in found.packed.last_rows]
    if truncation == "mask":
        assert all(ended)
        assert len(ended) == round(12 * (1 - metrics["response/truncated"]))
        return
    with torch.no_grad():
        follows = small_scalar().values(found.packed)[found.packed.last_rows]
    for i, stopped in enumerate(ended):
        cut = torch.tensor(-7.0) if truncation == "penalise" else scores[i] + follows[i]
        torch.testing.assert_close(returns_of(found, i)[-1], scores[i] if stopped else cut)


def test_pitfall_08_nothing_is_left_when_every_response_is_cut_and_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(policy: Any, prompts: list[list[int]], **_: Any) -> Rollout:
        return Rollout([Sample([*p, 5], len(p)) for p in prompts], [True] * len(prompts), [[0.0]] * len(prompts))

    monkeypatch.setattr("trainer.experience.sample", cut)
    found, metrics, _ = collected(tmp_path, truncation="mask")
    assert found is None
    assert metrics["response/truncated"] == 1
    ppo.train(ppo.PPOConfig(**world(tmp_path), truncation="mask"))
    assert [step["response/truncated"] for step in lines(tmp_path / "out" / "metrics.jsonl")] == [1, 1]


def test_pitfall_09_rewards_fall_by_the_kl_of_the_whole_response(tmp_path: Path) -> None:
    """Ouyang et al., equation 2: the return of a whole response is its score less beta times its log-ratio."""
    found, metrics, scores = collected(tmp_path, beta=0.3, max_new_tokens=200, temperature=1.5)
    assert found is not None
    policy, reference, kls = small_policy(), small_policy(seed=5), []
    for i in range(12):
        part = found.select([i])
        with torch.no_grad():
            logp, ref_logp = (m.stats(part.packed, 1.5).logp for m in (policy, reference))
        torch.testing.assert_close(part.old_logp, logp)
        kls.append(float((logp - ref_logp).sum()))
        assert returns_of(found, i)[0] == pytest.approx(float(scores[i]) - 0.3 * kls[-1], abs=1e-4)
    assert metrics["objective/kl"] == pytest.approx(sum(kls) / 12, rel=1e-4)


def test_pitfall_09_the_controller_follows_the_published_formula(tmp_path: Path) -> None:
    """Ziegler et al. 2019: e = clip(KL / target - 1, -0.2, 0.2), beta *= 1 + e * n / horizon; in the loop, too."""
    control, beta, source = KLController(0.15, 6.0, 10_000), 0.15, random.Random(0)
    for _ in range(50):
        kl = source.uniform(0, 15)
        control.update(kl, 512)
        beta *= 1 + max(-0.2, min(0.2, (kl - 6) / 6)) * 512 / 10_000
        assert control.coef == pytest.approx(beta, rel=1e-12)
    fixed = KLController(0.15)
    fixed.update(100.0, 512)
    assert fixed.coef == 0.15
    for odd in (math.nan, math.inf, -math.inf):
        control.update(odd, 512)
    assert control.coef == pytest.approx(beta, rel=1e-12), "what is not a number says nothing"

    options = world(tmp_path) | {"steps": 6, "kl_coef": 0.2, "kl_target_per_seq": 0.5, "kl_horizon": 100.0}
    ppo.train(ppo.PPOConfig(**options, lr=1e-2))
    beta = 0.2
    for step in lines(tmp_path / "out" / "metrics.jsonl"):
        assert step["objective/kl_coef"] == pytest.approx(beta, rel=1e-6)
        beta *= 1 + max(-0.2, min(0.2, step["objective/kl"] / 0.5 - 1)) * 10 / 100
    assert beta > 0.19


def test_pitfall_10_temperature_and_soft_cap_are_those_of_the_sampler(tmp_path: Path) -> None:
    """Log-probabilities of sampler, of training and of plain float64 arithmetic agree."""
    policy = small_policy()
    policy.parts = replace(policy.parts, constants={"softcap": 2.0})
    cfg = ppo.PPOConfig(data=tmp_path, reward="", temperature=0.6, max_new_tokens=20)
    batch, metrics = collect(
        cfg, policy, small_policy(seed=5), None, lambda rollout, records: torch.zeros(3), [[2, 3], [4], [5, 6, 7]],
        [{}] * 3, torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert metrics["rollout/sampler_delta"] < 1e-4
    assert batch is not None
    packed, mask = batch.packed, batch.packed.mask
    with torch.no_grad():
        z = policy.hidden(packed).double() @ policy.weight.double().T
    logp = torch.log_softmax(2.0 * torch.tanh(z / 2.0) / 0.6, -1)
    rows = mask.nonzero().squeeze(1)
    torch.testing.assert_close(batch.old_logp[mask].double(), logp[rows, packed.targets[mask]], rtol=1e-5, atol=1e-5)
    entropy = -(logp.exp() * logp).sum(-1)[mask]
    torch.testing.assert_close(batch.entropy[mask].double(), entropy, rtol=1e-5, atol=1e-5)


def test_pitfall_10_a_sampler_that_leaves_out_the_tail_is_refused_unless_allowed(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path) | {"steps": 1, "top_p": 0.9}
    for more in ({}, {"allow_top_p": True, "importance_cap": 2.0}):
        with pytest.raises(ValueError, match=r"top_p: got 0.9, want 1: .* biased. allow_top_p accepts"):
            ppo.train(ppo.PPOConfig(**options, **more))
    ppo.train(ppo.PPOConfig(**options, allow_top_p=True))
    (step,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert step["rollout/sampler_delta"] > 0.05  # the sampler spreads the tail's share over the rest
    assert step["sampling/importance_ratio_max"] < 1


def test_pitfall_11_metrics_count_what_was_sampled_and_nothing_else(tmp_path: Path) -> None:
    """Longer prompts in the same batch, and sequences without a target, change no metric; entropy is not negative."""
    policy = small_policy()
    samples = ragged(6)
    padded = [Sample([7] * 30, 30), *samples, Sample([3, 9, 9], 3)]
    few, many = experience(samples), experience(padded)
    rows = many.packed.select(range(1, 7))[1]
    columns = {}
    for name in ("old_logp", "ref_logp", "advantages"):
        column = torch.full((len(many.packed.input_ids),), 9.0)
        column[rows] = getattr(few, name)
        columns[name] = column
    more = Experience(many.packed, columns["old_logp"], columns["ref_logp"], many.entropy, many.scores,
                      many.truncated, advantages=columns["advantages"])  # fmt: skip
    method = grpo.GRPO(grpo.GRPOConfig(data=tmp_path, reward=""))
    totals = Totals(int(few.packed.mask.sum()), 6)
    found = [method.policy_loss(policy, x, totals, 0.1).metrics for x in (few, more)]
    assert found[0]["approx_kl"] > 0
    assert 0 < found[0]["clipfrac"] < 1
    assert found[0]["entropy"] >= 0
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x)


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

    monkeypatch.setattr("trainer.experience.sample", endless)
    options: dict[str, Any] = world(tmp_path) | {"batch_size": 20, "steps": 1, "truncation": truncation}
    ppo.train(ppo.PPOConfig(**options))
    said = capsys.readouterr().err
    assert said.count(f"{5 * cut}% of the responses were cut off") == (1 if told else 0)
    assert told in said
    assert ("Raise max_new_tokens" in said) == bool(told)
